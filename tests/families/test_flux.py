"""FLUX: outputs of the original and of the authors' dynamic form, diffusers' class live, what is skipped and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn

from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.dynamic.gates import ImposedGating, RoutingNoise, ThresholdGating
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import EXECUTIONS, CompactExecutor, DenseExecutor, executor_named
from dydit_cli.execution.streams import StreamCall
from dydit_cli.families.family import Hints
from dydit_cli.families.flux import DyFluxTransformer2DModel, image_ids, pack_latents, unpack_latents
from dydit_cli.families.flux_geometry import FluxGeometry
from dydit_cli.families.registry import family_named
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.flops import executed_ratio, macs_of, ratio_floor
from dydit_cli.profiling.counting import count_compact, count_static
from tests.tiny import bits, random_routing, relative_difference, tiny_inputs, tiny_model

CASES = Path(__file__).parent.parent / "parity"
TOLERANCE = 2e-5
ORIGINALS = ("flux_tiny_dev", "flux_tiny_schnell")
OURS = (
    "mlp_hidden_size",
    "num_groups",
    "always_on",
    "width",
    "token_router",
    "token_rank",
    "td_lora",
    "sample_size",
    "text_tokens",
)
DYNAMIC = pytest.mark.parametrize("execution", ["dense", "compact"])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def load_case(name: str) -> tuple[DyFluxTransformer2DModel, dict[str, Any], Tensor, dict[str, Tensor]]:
    """The model of a case, the keywords of its forward, what comes out, and everything else."""
    flux = family_named("flux")
    source = flux.read(
        read_checkpoint(CASES / name / "checkpoint.pt").tensors, Hints(axes_dims_rope=(4, 6, 6))
    )
    model = flux.build(source.config)
    _, unexpected = model.load_state_dict(dict(source.tensors), strict=False)
    assert not unexpected
    case = load_file(CASES / name / "io.safetensors")
    keywords = {
        "hidden_states": case["img"],
        "encoder_hidden_states": case["txt"],
        "pooled_projections": case["y"] if "y" in case else case["pooled"],
        "timestep": case["timesteps"],
        "img_ids": case["img_ids"][0],
        "txt_ids": case["txt_ids"][0],
        "guidance": case["guidance"] if model.config["guidance_embeds"] else None,
    }
    return model.eval(), keywords, case["out"], case


def static_twin(model: DyFluxTransformer2DModel) -> FluxTransformer2DModel:
    """diffusers' model with the same weights."""
    config = {
        key: value for key, value in model.config.items() if key not in OURS and not key.startswith("_")
    }
    twin = FluxTransformer2DModel(**config).to(model.dtype).eval()
    state = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if "_router." not in key and not key.endswith("_order")
    }
    twin.load_state_dict(state)
    return twin


def forward_inputs(model: DyFluxTransformer2DModel, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """Keywords of a forward, with different timesteps and guidance."""
    sample, times, condition = tiny_inputs(model, batch, seed)
    height, width = sample.shape[-2:]
    cast = model.dtype
    return {
        "hidden_states": pack_latents(sample).to(cast),
        "encoder_hidden_states": condition.prompt_embeds.to(cast),
        "pooled_projections": condition.pooled.to(cast),
        "timestep": times.to(cast),
        "img_ids": image_ids(height, width, sample.device, cast),
        "txt_ids": torch.zeros(condition.prompt_embeds.shape[1], 3, dtype=cast),
        "guidance": torch.linspace(1, 5, batch) if model.config["guidance_embeds"] else None,
    }


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


class TestParity:
    @pytest.mark.parametrize("name", ORIGINALS)
    @pytest.mark.parametrize("execution", EXECUTIONS)
    def test_original_output(self, name: str, execution: str) -> None:
        """Straight after conversion every unit is on: the routers' start decides it, not the test."""
        model, keywords, expected, _ = load_case(name)
        assert difference(model.set_execution(execution)(**keywords).sample, expected) < TOLERANCE

    @pytest.mark.parametrize("name", ORIGINALS)
    def test_dense_is_diffusers_bit_for_bit(self, name: str) -> None:
        model, keywords, _, _ = load_case(name)
        expected = static_twin(model)(**keywords).sample
        for execution in ("static", "dense"):
            assert torch.equal(bits(model.set_execution(execution)(**keywords).sample), bits(expected))

    @DYNAMIC
    def test_the_authors_output_and_exact_masks(self, execution: str) -> None:
        model, keywords, expected, case = load_case("dyflux_official_tiny")
        names = [
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
        ]
        output, routing = model._predict(
            *(keywords[name] for name in names),
            keywords["guidance"],
            executor=executor_named(execution),
            gating=ThresholdGating(),
        )
        assert difference(output, expected) < TOLERANCE
        assert torch.equal(model.set_execution(execution)(**keywords).sample, output)
        blocks = [
            f"{kind}.{index}"
            for kind in ("transformer_blocks", "single_transformer_blocks")
            for index in range(2)
        ]
        for name, block in zip(blocks, routing.blocks, strict=True):
            assert torch.equal(block.tokens, case[f"mask.{name}"].squeeze(-1))
            assert block.heads.all()
            assert block.groups.all()
        assert 0.5 < float(torch.stack([block.tokens for block in routing.blocks]).mean()) < 0.95

    def test_the_case_needs_its_masks(self) -> None:
        model, keywords, expected, _ = load_case("dyflux_official_tiny")
        assert difference(model.set_execution("static")(**keywords).sample, expected) > 1


class WholeImages(nn.Module):
    """A projection of an IP-adapter's images that leaves them as they are."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return images


class TestLiveParity:
    """diffusers' own class with the same random weights."""

    @pytest.mark.parametrize("guidance", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_complete_execution(self, guidance: bool, dtype: torch.dtype) -> None:
        model = tiny_model("flux", guidance_embeds=guidance).to(dtype).set_keep_bias(float("inf"))
        keywords = forward_inputs(model)
        expected = static_twin(model)(**keywords).sample
        for execution in ("static", "dense"):
            assert torch.equal(bits(model.set_execution(execution)(**keywords).sample), bits(expected))
        compact = model.set_execution("compact")(**keywords).sample
        assert relative_difference(compact, expected) < (1e-5 if dtype == torch.float32 else 2e-2)

    @pytest.mark.parametrize("execution", EXECUTIONS)
    def test_every_keyword(self, execution: str) -> None:
        model = (
            tiny_model("flux", num_layers=3, num_single_layers=3)
            .set_keep_bias(float("inf"))
            .set_execution(execution)
        )
        twin, keywords = static_twin(model), forward_inputs(model)
        shape = (2, 16, 48)
        draws = torch.Generator().manual_seed(0)
        residuals = [torch.randn(shape, generator=draws) for _ in range(2)]
        for more in (
            {"controlnet_block_samples": residuals},
            {"controlnet_block_samples": residuals, "controlnet_blocks_repeat": True},
            {"controlnet_single_block_samples": residuals},
            {"controlnet_block_samples": residuals[:1], "controlnet_single_block_samples": residuals},
            {"joint_attention_kwargs": {}},
            {"joint_attention_kwargs": {"scale": 0.5}},
            {"img_ids": keywords["img_ids"][None], "txt_ids": keywords["txt_ids"][None]},
        ):
            expected = twin(**(keywords | more)).sample
            (actual,) = model(**(keywords | more), return_dict=False)
            assert relative_difference(actual, expected) < 1e-5, more

    def test_ip_adapters_in_static_execution(self) -> None:
        model = tiny_model("flux").set_execution("static")
        twin, keywords = static_twin(model), forward_inputs(model)
        plain = model(**keywords).sample
        outputs = []
        for net in (model, twin):
            torch.manual_seed(0)
            net.encoder_hid_proj = WholeImages()
            for block in net.transformer_blocks:
                block.attn.set_processor(FluxIPAdapterAttnProcessor(48, 10))
            images = [torch.randn(2, 3, 10)]
            outputs.append(net(**keywords, joint_attention_kwargs={"ip_adapter_image_embeds": images}).sample)
        assert torch.equal(bits(outputs[0]), bits(outputs[1]))
        assert relative_difference(outputs[0], plain) > 1e-3
        with pytest.raises(DyditError, match="FluxIPAdapterAttnProcessor"):
            model.set_execution("compact")(**keywords)

    def test_any_size_of_image_and_text(self) -> None:
        model = tiny_model("flux").set_keep_bias(float("inf"))
        keywords = forward_inputs(model) | {
            "hidden_states": torch.randn(2, 6 * 3, 16),
            "img_ids": image_ids(12, 6, torch.device("cpu"), torch.float32),
            "encoder_hidden_states": torch.randn(2, 9, 20),
            "txt_ids": torch.zeros(9, 3),
        }
        expected = static_twin(model)(**keywords).sample
        for execution in EXECUTIONS:
            assert relative_difference(model.set_execution(execution)(**keywords).sample, expected) < 1e-5

    def test_wider_inputs_are_packed_beside_the_sample(self) -> None:
        """FLUX Fill: 384 channels in, 64 out."""
        model = tiny_model("flux", in_channels=32, out_channels=16).set_keep_bias(float("inf"))
        assert model.geometry.extra_channels == 4
        assert model.geometry.sample_shape == (4, 8, 8)
        sample, times, condition = tiny_inputs(model, 2)
        output, _ = model.denoise(sample, times, condition)
        packed = torch.cat([pack_latents(sample), pack_latents(condition.extra)], dim=2)
        keywords = forward_inputs(model) | {"hidden_states": packed, "guidance": condition.guidance}
        assert relative_difference(pack_latents(output), static_twin(model)(**keywords).sample) < 1e-5
        with pytest.raises(DyditError, match="4 channels of latents beside the sample"):
            model.denoise(sample, times, replace(condition, extra=None))

    def test_keys_are_those_of_diffusers(self) -> None:
        model = tiny_model("flux")
        static = set(static_twin(model).state_dict())
        beside = set(model.state_dict()) - static
        assert {key.rsplit(".", 1)[-1] for key in beside} >= {"head_order", "channel_order", "weight", "bias"}
        assert all("_router." in key or key.endswith("_order") for key in beside)
        assert len([key for key in beside if key.endswith("_order")]) == 2 * 3 + 2

    def test_packing_is_the_pipeline_s(self) -> None:
        latents = torch.randn(2, 4, 6, 8)
        packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
        assert torch.equal(pack_latents(latents), packed)
        assert torch.equal(unpack_latents(packed, 6, 8), latents)
        ids = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
        assert torch.equal(image_ids(6, 8, torch.device("cpu"), torch.float32), ids)


class TestSkipping:
    @DYNAMIC
    def test_a_token_skipped_everywhere_keeps_its_residual_of_attention_alone(self, execution: str) -> None:
        """In a single block a skipped image token comes out as it went in; kept tokens see it as key and value."""
        model = tiny_model("flux")
        block, executor = model.single_transformer_blocks[0], executor_named(execution)
        image, text, conditioning = torch.randn(2, 16, 48), torch.randn(2, 5, 48), torch.randn(2, 48)
        rope = model.pos_embed(torch.zeros(21, 3))
        routing = random_routing(model.geometry, 2)
        width = block.decide_width(conditioning, ImposedGating(routing), 2)
        before = image.clone()
        call = StreamCall(image, text, conditioning, rope, width, ImposedGating(routing), 2)
        after, after_text, keep = executor.single(block, call)
        assert 0 < float(keep.mean()) < 1
        assert torch.equal(after[keep == 0], before[keep == 0])
        assert not torch.isclose(after[keep == 1], before[keep == 1]).all()
        assert torch.equal(image, before)
        other = image.clone()
        other[keep == 0] = other[keep == 0].flip(-1)  # a constant would be lost in LayerNorm
        _, moved_text, _ = executor.single(block, replace(call, image=other))
        assert difference(moved_text, after_text) > 1e-3

    def test_context_groups_have_masks_of_their_own(self) -> None:
        model = tiny_model("flux")
        arguments = tiny_inputs(model, 2)
        routing = random_routing(model.geometry, 2)
        full = Routing(tuple(replace(block, context_groups=None) for block in routing.blocks))
        outputs = [
            model.denoise(*arguments, executor=executor, gating=ImposedGating(masks))[0]
            for executor in (DenseExecutor(), CompactExecutor())
            for masks in (routing, full)
        ]
        assert relative_difference(outputs[2], outputs[0]) < 1e-5
        assert relative_difference(outputs[3], outputs[1]) < 1e-5
        assert relative_difference(outputs[1], outputs[0]) > 1e-3

    @pytest.mark.parametrize("width", ["free", "ordered", False])
    @pytest.mark.parametrize("token_router", ["low-rank", "authors"])
    def test_every_kind_of_router(self, width: str | bool, token_router: str) -> None:
        model = family_named("flux").build(
            tiny_model("flux").config | {"width": width, "token_router": token_router}
        )
        draws = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "token_router" in name or "_router" not in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=draws))
        model.eval()
        arguments = tiny_inputs(model, 4)
        dense, first = model.denoise(*arguments, executor=DenseExecutor(), gating=ThresholdGating())
        compact, second = model.denoise(*arguments, executor=CompactExecutor(), gating=ThresholdGating())
        assert torch.equal(first.tokens, second.tokens)
        assert 0 < float(first.tokens.mean()) < 1
        assert relative_difference(compact, dense) < 1e-5
        macs = sum(model.geometry.block_router_macs())
        assert macs == macs_of(model.geometry, first).routers > 0
        if width is False:
            assert first.heads.all()
            assert not any(
                "head_router" in name or "channel_router" in name for name, _ in model.named_parameters()
            )

    def test_noise_of_the_text_s_groups_changes_no_other_draw(self) -> None:
        model = tiny_model("flux")
        noise = RoutingNoise.draw(model.geometry, 0, 0, [3])
        assert noise.context_groups is not None
        assert noise.context_groups.shape == noise.groups.shape
        assert not torch.equal(noise.context_groups, noise.groups)


class TestErrors:
    def test_missing_and_superfluous_inputs(self) -> None:
        model = tiny_model("flux")
        keywords = forward_inputs(model)
        with pytest.raises(DyditError, match="needs pooled_projections, img_ids"):
            model(**(keywords | {"pooled_projections": None, "img_ids": None}))
        with pytest.raises(DyditError, match="needs guidance"):
            model(**(keywords | {"guidance": None}))
        with pytest.raises(DyditError, match="takes no guidance"):
            tiny_model("flux", guidance_embeds=False)(**keywords)

    @DYNAMIC
    def test_ip_adapters_and_processors_are_for_static_execution(self, execution: str) -> None:
        model = tiny_model("flux").set_execution(execution)
        keywords = forward_inputs(model)
        with pytest.raises(DyditError, match=r"joint_attention_kwargs\['ip_hidden_states'\]") as error:
            model(**keywords, joint_attention_kwargs={"ip_hidden_states": []})
        assert "static" in error.value.fix
        model.fuse_qkv_projections()
        with pytest.raises(DyditError, match="fused projections"):
            model(**keywords)
        expected = static_twin(tiny_model("flux"))(**keywords).sample
        assert relative_difference(model.set_execution("static")(**keywords).sample, expected) < 1e-5

    @pytest.mark.parametrize("shape", [(3, 8, 8), (4, 7, 8), (4, 8), (4, 8, 8, 8)])
    def test_a_wrong_size_is_explained(self, shape: tuple[int, ...]) -> None:
        model = tiny_model("flux")
        _, times, condition = tiny_inputs(model, 2)
        with pytest.raises(DyditError, match="4 channels and even sides"):
            model.denoise(torch.zeros(2, *shape), times, condition)

    def test_numbers_that_do_not_fit(self) -> None:
        for changes, match in (
            ({"num_groups": 7}, "7 channel groups do not divide"),
            ({"in_channels": 18}, "no multiple of 4"),
            ({"token_router": "low-rnk"}, "low-rank"),
            ({"width": "orderd"}, "orderd"),
        ):
            with pytest.raises(DyditError) as error:
                DyFluxTransformer2DModel(**(dict(tiny_model("flux").config) | changes))
            assert match in f"{error.value.what} {error.value.why} {error.value.fix}"

    def test_compiling_and_labels_are_refused(self) -> None:
        model = tiny_model("flux")
        with pytest.raises(DyditError, match="not compiled"):
            model.set_execution("compact", compile=True)
        with pytest.raises(DyditError, match="no class labels"):
            model.plan([0.5], [1])


def dev(**changes: Any) -> FluxGeometry:
    with torch.device("meta"):
        model = family_named("flux").build(family_named("flux").presets["dev"])
    assert isinstance(model.geometry, FluxGeometry)
    return replace(model.geometry, **changes)


class TestCosts:
    @pytest.mark.parametrize(
        ("size", "numbers", "keys"),
        [
            ("dev", 11_901_408_320, 1160),
            ("schnell", 11_891_178_560, 1156),
            ("lite", 8_163_264_064, 808),
        ],
    )
    def test_published_sizes(self, size: str, numbers: int, keys: int) -> None:
        with torch.device("meta"):
            model = family_named("flux").build(family_named("flux").presets[size])
        static = [
            tensor
            for key, tensor in model.state_dict().items()
            if "_router." not in key and not key.endswith("_order")
        ]
        assert sum(tensor.numel() for tensor in static) == numbers
        assert len(static) == keys
        routers = sum(parameter.numel() for parameter in model.router_parameters())
        assert routers < 0.006 * numbers
        assert model.geometry.num_tokens == 4096

    def test_the_authors_router_is_as_heavy_as_said(self) -> None:
        with torch.device("meta"):
            model = family_named("flux").build(
                family_named("flux").presets["lite"] | {"width": False, "token_router": "authors"}
            )
        assert sum(parameter.numel() for parameter in model.router_parameters()) == pytest.approx(
            1.74e9, rel=1e-2
        )

    def test_a_single_block_that_keeps_half_of_the_image(self) -> None:
        """12C^2 and attention a token; with half of an image's tokens kept, 0.57 of the block, where a gather of the MLP and the
        projection alone leaves 0.70."""
        geometry = dev(text_tokens=0)
        single = geometry.block_costs()[-1]
        tokens = (torch.arange(4096) < 2048).float()[None]
        half = single.executed(BlockRouting(torch.ones(1, 24), torch.ones(1, 24), tokens))
        complete = float(sum(single.complete))
        assert float(sum(half)) / complete == pytest.approx(0.57, abs=5e-3)
        channels = geometry.hidden_size
        assert complete == 4096 * (12 * channels**2 + 2 * 4096 * channels)
        skipped = single.executed(BlockRouting(torch.ones(1, 24), torch.ones(1, 24), torch.zeros(1, 4096)))
        assert float(sum(skipped)) == 4096 * 2 * channels**2

    def test_total_of_flux_dev(self) -> None:
        """1024 px and 512 tokens of text."""
        geometry, channels, total = dev(), 3072, 4096 + 512
        report = macs_of(geometry)
        assert report.attention == 57 * (4 * total * channels**2 + 2 * total**2 * channels)
        assert report.mlp == 57 * 8 * total * channels**2
        assert report.total == pytest.approx(3.73e13, rel=1e-2)

    def test_other_sizes_are_counted_at_their_own_tokens(self) -> None:
        """A ratio refers to the static model on the same image."""
        geometry = dev()
        smaller = geometry.at(64, 96, 256)
        assert (smaller.num_tokens, smaller.text_tokens) == (32 * 48, 256)
        complete = random_routing(replace(smaller, num_tokens=32 * 48), 1, keep=1.1)
        assert executed_ratio(complete, geometry).tolist() == pytest.approx([1.0])
        assert macs_of(replace(geometry, text_tokens=256), complete).attention == pytest.approx(
            macs_of(smaller).attention
        )

    def test_floors(self) -> None:
        assert 0.1 < ratio_floor(dev(routed_width=False)) < 0.6
        assert ratio_floor(dev()) < 0.05
        assert ratio_floor(dev(always_on=False)) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_blocks_of_flux_dev_by_the_counters() -> None:
    """One block of each kind at full width, on fewer tokens: fvcore and torch's counter against the formula."""
    flux = family_named("flux")
    sizes = {"num_layers": 1, "num_single_layers": 1, "sample_size": 32, "text_tokens": 64}
    model = flux.build(dict(flux.presets["dev"]) | sizes).eval()
    assert model.geometry.hidden_size == 3072
    inputs = tiny_inputs(model, 1)
    static = count_static(model, *inputs)
    assert static.deviation < 1e-3
    routing = random_routing(model.geometry, 1, keep=0.5)
    compact = count_compact(model, routing, *inputs)
    assert compact.deviation < 1e-3
    assert compact.formula < 0.5 * static.formula


class TestTextCondition:
    def test_it_behaves_like_labels(self) -> None:
        condition = TextCondition(torch.randn(4, 5, 6), torch.randn(4, 3), torch.arange(4.0))
        assert len(condition) == 4
        assert condition[[2, 0]].guidance.tolist() == [2.0, 0.0]
        assert condition[torch.tensor([3])].pooled.shape == (1, 3)
        assert torch.equal(condition[1:3].prompt_embeds, condition.prompt_embeds[1:3])
        together = TextCondition.cat([condition, condition[:1]])
        assert len(together) == 5
        assert together.extra is None
        assert condition.to("cpu").pooled.device.type == "cpu"
