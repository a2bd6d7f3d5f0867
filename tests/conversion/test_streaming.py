"""Streamed conversion: the same orders and weights as in memory, types kept, one pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily
from dydit_cli.conversion.convert import convert
from dydit_cli.conversion.fresh_routers import fresh_routers
from dydit_cli.conversion.streaming import Ranking, difference_of, stream_model, stream_weights
from dydit_cli.errors import DyditError
from dydit_cli.families import original_flux
from dydit_cli.families.family import Hints
from dydit_cli.families.registry import DIT, FLUX
from dydit_cli.families.unit_weights import dit_units, flux_units

CASES = Path(__file__).parent.parent / "parity"
TINY = Hints(axes_dims_rope=(4, 6, 6))
HIDDEN, HEADS, MLP = 32, 2, 128


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def flux_ranking(**changes: object) -> Ranking:
    units = tuple(flux_units(2, 2, HIDDEN, HEADS, MLP))
    return Ranking(units=units, num_groups=4, **changes)  # type: ignore[arg-type]


def written(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


class TestLikeInMemory:
    """DiT through both ways: what is streamed is what `convert` writes."""

    @pytest.fixture
    def in_memory(self, tmp_path: Path) -> dict[str, Tensor]:
        convert(
            CASES / "dit_tiny" / "checkpoint.pt",
            out=tmp_path / "c",
            family="dit",
            num_heads=self.heads(),
            num_groups=4,
        )
        return written(tmp_path / "c")

    def heads(self) -> int:
        config = json.loads((CASES / "dit_tiny" / "case.json").read_text(encoding="utf-8"))["config"]
        return int(config["num_heads"])

    def test_same_orders_and_weights(self, tmp_path: Path, in_memory: dict[str, Tensor]) -> None:
        source = DIT.read(
            open_checkpoint(CASES / "dit_tiny" / "checkpoint.pt").tensors,
            Hints(num_heads=self.heads(), num_groups=4),
        )
        config = source.config
        units = dit_units(
            config["num_layers"],
            config["hidden_size"],
            config["num_attention_heads"],
            config["mlp_hidden_size"],
        )
        with torch.device("meta"):
            model = DIT.build(config)
        additions = fresh_routers(model, seed=0)
        streamed = tmp_path / "s"
        streamed.mkdir()
        result = stream_weights(
            streamed, lazily(source.tensors), Ranking(tuple(units), num_groups=4), additions
        )
        content = written(streamed)
        assert set(content) == set(in_memory)
        static = [key for key in content if "_router." not in key]
        assert all(torch.equal(content[key], in_memory[key]) for key in static)
        assert set(result.orders) == {key for key in static if key.endswith("_order")}
        for key in set(content) - set(static):
            assert content[key].shape == in_memory[key].shape
            if key.endswith("bias"):
                assert torch.equal(content[key], in_memory[key])


class TestFlux:
    def test_orders_follow_the_formula(self, tmp_path: Path) -> None:
        """Written out by hand for one double and one single block."""
        state = tiny_flux().state_dict()
        result = stream_weights(tmp_path, lazily(state), flux_ranking(), {})

        def head_scores(value: Tensor, output: Tensor) -> Tensor:
            return torch.stack(
                [
                    value[16 * h : 16 * h + 16].norm() * output[:, 16 * h : 16 * h + 16].norm()
                    for h in range(HEADS)
                ]
            )

        block = "transformer_blocks.1."
        expected = head_scores(
            state[f"{block}attn.to_v.weight"], state[f"{block}attn.to_out.0.weight"]
        ) + head_scores(state[f"{block}attn.add_v_proj.weight"], state[f"{block}attn.to_add_out.weight"])
        assert torch.allclose(result.scores[f"{block}attn.head_order"], expected, rtol=1e-6)
        assert torch.equal(
            result.orders[f"{block}attn.head_order"],
            result.scores[f"{block}attn.head_order"].argsort(descending=True),
        )
        text = result.scores[f"{block}ff_context.channel_order"]
        rows, columns = (
            state[f"{block}ff_context.net.0.proj.weight"],
            state[f"{block}ff_context.net.2.weight"],
        )
        assert torch.allclose(text[5], rows[5].norm() * columns[:, 5].norm(), rtol=1e-6)

        block = "single_transformer_blocks.0."
        output = state[f"{block}proj_out.weight"]
        expected = head_scores(state[f"{block}attn.to_v.weight"], output[:, :HIDDEN])
        assert torch.allclose(result.scores[f"{block}attn.head_order"], expected, rtol=1e-6)
        channel = state[f"{block}proj_mlp.weight"][7].norm() * output[:, HIDDEN + 7].norm()
        assert torch.allclose(result.scores[f"{block}channel_order"][7], channel, rtol=1e-6)

    @pytest.mark.parametrize("shards", ["5GB", "60KB"])
    def test_from_a_sharded_original_in_bf16(self, tmp_path: Path, shards: str) -> None:
        """Sharded in and out, the types of every tensor kept, every number the source's."""
        state = {key: value.bfloat16() for key, value in tiny_flux().state_dict().items()}
        original = original_flux.write(state)
        source = save_sharded(tmp_path / "in", original)
        read = original_flux.read(open_checkpoint(source).tensors, TINY)
        out = tmp_path / "out"
        out.mkdir()
        additions = {"transformer_blocks.0.head_router.linear.bias": torch.full((3,), 15.0)}
        result = stream_weights(out, lazily(read.tensors), flux_ranking(), additions, max_shard_size=shards)
        assert (len(result.files) > 1) == (shards != "5GB")
        content = open_checkpoint(out).tensors
        assert all(torch.equal(content[key], state[key]) for key in state)
        assert all(content[key].dtype == torch.bfloat16 for key in state)
        assert content["transformer_blocks.0.head_router.linear.bias"].dtype == torch.float32
        assert content["transformer_blocks.0.attn.head_order"].dtype == torch.int64
        assert sorted(content["single_transformer_blocks.1.channel_order"].tolist()) == list(range(MLP))
        largest, extra = difference_of(out, lazily(read.tensors))
        assert largest == 0.0
        assert len(extra) == 1 + len(result.orders) == 1 + 2 * 3 + 2 * 2

    def test_cast(self, tmp_path: Path) -> None:
        state = tiny_flux().state_dict()
        stream_weights(tmp_path, lazily(state), flux_ranking(), {}, dtype=torch.bfloat16)
        content = written(tmp_path)
        assert all(torch.equal(content[key], state[key].bfloat16()) for key in state)
        assert difference_of(tmp_path, lazily(state), torch.bfloat16)[0] == 0.0
        assert difference_of(tmp_path, lazily(state))[0] > 0

    def test_scores_of_an_earlier_conversion(self, tmp_path: Path) -> None:
        state = lazily(tiny_flux().state_dict())
        scores = {unit.order: torch.arange(unit.units).float() for unit in flux_ranking().units}
        result = stream_weights(tmp_path, state, flux_ranking(scores=scores), {})
        assert result.orders["transformer_blocks.0.attn.head_order"].tolist() == [1, 0]
        assert result.orders["transformer_blocks.0.ff.channel_order"][0] == MLP - 1

    def test_contiguous_groups(self, tmp_path: Path) -> None:
        result = stream_weights(
            tmp_path, lazily(tiny_flux().state_dict()), flux_ranking(grouping="contiguous"), {}
        )
        order = result.orders["transformer_blocks.0.ff.channel_order"].view(4, -1)
        assert all(torch.equal(group, torch.arange(group[0], group[0] + MLP // 4)) for group in order)

    def test_every_tensor_is_read_once(self, tmp_path: Path) -> None:
        counting = Counting(lazily(tiny_flux().state_dict()))
        stream_weights(tmp_path, counting, flux_ranking(), {})
        assert set(counting.reads.values()) == {1}

    def test_weights_that_are_no_numbers(self, tmp_path: Path) -> None:
        state = dict(tiny_flux().state_dict())
        state["proj_out.bias"] = torch.full_like(state["proj_out.bias"], float("nan"))
        with pytest.raises(DyditError, match=r"proj_out\.bias"):
            stream_weights(tmp_path, lazily(state), flux_ranking(), {})
        assert not list(tmp_path.iterdir())

    def test_a_cast_that_overflows(self, tmp_path: Path) -> None:
        state = dict(tiny_flux().state_dict())
        state["proj_out.bias"] = torch.full_like(state["proj_out.bias"], 1e6)
        with pytest.raises(DyditError, match="float16"):
            stream_weights(tmp_path, lazily(state), flux_ranking(), {}, dtype=torch.float16)

    def test_dynamic_already(self, tmp_path: Path) -> None:
        state = tiny_flux().state_dict() | {"transformer_blocks.0.attn.head_order": torch.arange(2)}
        with pytest.raises(DyditError, match="dynamic already"):
            stream_weights(tmp_path, lazily(state), flux_ranking(), {})


class TestModel:
    """The whole chain at tiny size: what is written loads, and computes what the original computed."""

    @pytest.mark.parametrize("name", ["flux_tiny_dev", "flux_tiny_schnell"])
    @pytest.mark.parametrize("execution", ["dense", "compact"])
    def test_outputs_of_the_original(self, tmp_path: Path, name: str, execution: str) -> None:
        source = FLUX.read(open_checkpoint(CASES / name / "checkpoint.pt").tensors, TINY)
        units = original_flux.units_of(source.config)
        result = stream_model(tmp_path, FLUX, source, units, seed=0, max_shard_size="500KB")
        assert len(result.files) > 1
        model = load_model(tmp_path, execution=execution)
        case = load_file(CASES / name / "io.safetensors")
        with torch.no_grad():
            out = model(
                hidden_states=case["img"],
                encoder_hidden_states=case["txt"],
                pooled_projections=case["y"],
                timestep=case["timesteps"],
                img_ids=case["img_ids"][0],
                txt_ids=case["txt_ids"][0],
                guidance=case["guidance"] if source.config["guidance_embeds"] else None,
            ).sample
        assert float((out - case["out"]).abs().max()) < 2e-5

    def test_authors_routers_are_kept(self, tmp_path: Path) -> None:
        tensors = open_checkpoint(CASES / "dyflux_official_tiny" / "checkpoint.pt").tensors
        source = FLUX.read(tensors, TINY)
        stream_model(tmp_path, FLUX, source, original_flux.units_of(source.config), seed=0)
        content = written(tmp_path)
        assert all(torch.equal(content[key], source.tensors[key]) for key in source.tensors)
        order = content["transformer_blocks.0.attn.head_order"]
        assert torch.equal(order, torch.arange(4))
        assert load_model(tmp_path).config["token_router"] == "authors"

    def test_the_model_has_every_order_that_is_ranked(self) -> None:
        config = original_flux.read(dict(tiny_flux().state_dict()), TINY).config
        with torch.device("meta"):
            model = FLUX.model_class(**config)
        orders = {name for name, _ in model.named_buffers() if name.endswith("_order")}
        assert orders == {unit.order for unit in original_flux.units_of(config)}


class Counting(LazyTensors):
    """Counts how often each tensor is read."""

    def __init__(self, tensors: LazyTensors) -> None:
        self._tensors = tensors
        self.reads = dict.fromkeys(tensors, 0)

    def __getitem__(self, key: str) -> Tensor:
        self.reads[key] += 1
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        return self._tensors.spec(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._tensors.rows(key, start, stop)


def save_sharded(folder: Path, tensors: object) -> Path:
    """Two shards with an index, as a hub's folder has them."""
    folder.mkdir()
    content = dict(tensors)  # type: ignore[call-overload]
    weight_map = {key: f"part-{index % 2}.safetensors" for index, key in enumerate(content)}
    for name in set(weight_map.values()):
        save_file(
            {key: content[key].contiguous() for key, at in weight_map.items() if at == name}, folder / name
        )
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    return folder
