"""FLUX's two layouts: outputs of the original through diffusers' class, the maps both ways, and what is read from shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.checkpoints.layout import Rearranged
from dydit_cli.checkpoints.lazy import TensorSpec, lazily
from dydit_cli.errors import DyditError
from dydit_cli.families import original_flux
from dydit_cli.families.family import Hints

CASES = Path(__file__).parent.parent / "parity"
TINY = Hints(axes_dims_rope=(4, 6, 6))
STATIC = ("flux_tiny_dev", "flux_tiny_schnell")
OURS = ("mlp_hidden_size", "num_groups", "width", "token_router")


def checkpoint(name: str) -> dict[str, Tensor]:
    return dict(read_checkpoint(CASES / name / "checkpoint.pt").tensors)


def diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in OURS}


def tiny_flux(**changes: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**(config | changes))


def full_size(**changes: Any) -> dict[str, TensorSpec]:
    """Shapes of a published size, without its 24 GB."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**({"guidance_embeds": True} | changes))
    return lazily(model.state_dict()).specs


@pytest.mark.parametrize("name", STATIC)
class TestParity:
    def test_the_original_outputs(self, name: str) -> None:
        source = original_flux.read(checkpoint(name), TINY)
        case = load_file(CASES / name / "io.safetensors")
        model = FluxTransformer2DModel(**diffusers_config(source.config)).eval()
        model.load_state_dict(dict(source.tensors))
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

    def test_the_config_is_what_the_original_was_made_with(self, name: str) -> None:
        theirs = json.loads((CASES / name / "case.json").read_text(encoding="utf-8"))["config"]
        config = original_flux.read(checkpoint(name), TINY).config
        assert config["num_layers"] == theirs["depth"]
        assert config["num_single_layers"] == theirs["depth_single_blocks"]
        assert config["num_attention_heads"] == theirs["num_heads"]
        assert config["in_channels"] == theirs["in_channels"]
        assert config["out_channels"] == theirs["out_channels"]
        assert config["joint_attention_dim"] == theirs["context_in_dim"]
        assert config["pooled_projection_dim"] == theirs["vec_in_dim"]
        assert config["guidance_embeds"] == theirs["guidance_embed"]
        assert config["mlp_hidden_size"] == theirs["hidden_size"] * theirs["mlp_ratio"]

    def test_there_and_back_bit_for_bit(self, name: str) -> None:
        before = checkpoint(name)
        after = original_flux.write(original_flux.read(before, TINY).tensors)
        assert set(after) == set(before)
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_back_and_there_bit_for_bit() -> None:
    """The other direction, from diffusers' side, of a model whose halves of the last modulation differ."""
    state = tiny_flux().state_dict()
    original = original_flux.write(state)
    again = original_flux.read(original, TINY)
    assert set(again.tensors) == set(state)
    assert all(torch.equal(again.tensors[key], state[key]) for key in state)
    first, second = state["norm_out.linear.bias"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.bias"], torch.cat([second, first]))
    assert not torch.equal(first, second)


def test_rows_of_a_rearranged_tensor_are_those_of_the_whole() -> None:
    """Reading a few rows crosses the seams of a fused tensor."""
    original = original_flux.write(tiny_flux().state_dict())
    fused = Rearranged(
        tiny_flux().state_dict(), original_flux.to_original(lazily(tiny_flux().state_dict()).specs)
    )
    assert torch.equal(fused["single_blocks.0.linear1.weight"], original["single_blocks.0.linear1.weight"])
    whole = fused["single_blocks.0.linear1.weight"]
    for start, stop in ((0, 5), (30, 34), (60, 100), (0, 10_000), (7, 7)):
        assert torch.equal(fused.rows("single_blocks.0.linear1.weight", start, stop), whole[start:stop])


class TestSizes:
    @pytest.mark.parametrize(
        ("changes", "original_keys", "diffusers_keys", "numbers"),
        [
            ({}, 780, 1160, 11_901_408_320),
            ({"guidance_embeds": False}, 776, 1156, 11_891_178_560),
            ({"num_layers": 8}, 516, 808, 8_163_264_064),
        ],
        ids=["dev", "schnell", "lite"],
    )
    def test_published(
        self, changes: dict[str, Any], original_keys: int, diffusers_keys: int, numbers: int
    ) -> None:
        specs = full_size(**changes)
        original = original_flux.to_original(specs)
        assert (len(original), len(specs)) == (original_keys, diffusers_keys)
        assert sum(spec.numel for spec in specs.values()) == numbers
        config = original_flux.geometry(specs, Hints())
        assert config["axes_dims_rope"] == (16, 56, 56)
        assert (config["num_attention_heads"], config["mlp_hidden_size"]) == (24, 12288)
        assert config["num_layers"] == changes.get("num_layers", 19)
        assert config["guidance_embeds"] == changes.get("guidance_embeds", True)

    @pytest.mark.parametrize(("double", "single"), [(8, 38), (5, 10), (1, 1), (1, 0)])
    def test_siblings_cut_in_depth(self, double: int, single: int) -> None:
        state = tiny_flux(num_layers=double, num_single_layers=single).state_dict()
        source = original_flux.read(original_flux.write(state), TINY)
        assert (source.config["num_layers"], source.config["num_single_layers"]) == (double, single)
        assert all(torch.equal(source.tensors[key], state[key]) for key in state)

    def test_fill_has_wider_inputs(self) -> None:
        state = tiny_flux(in_channels=384, out_channels=64).state_dict()
        config = original_flux.read(state, TINY).config
        assert (config["in_channels"], config["out_channels"]) == (384, 64)


class TestRecognising:
    def test_layouts(self) -> None:
        state = tiny_flux().state_dict()
        original = original_flux.write(state)
        assert original_flux.recognises_diffusers(state)
        assert not original_flux.recognises_original(state)
        assert original_flux.recognises_original(original)
        assert not original_flux.recognises_diffusers(original)
        assert original_flux.recognises(state)
        assert original_flux.recognises(original)

    def test_a_dit_is_none(self) -> None:
        assert not original_flux.recognises(checkpoint("dit_tiny"))


class TestAuthorsDynamic:
    def test_routers_become_ours(self) -> None:
        before = checkpoint("dyflux_official_tiny")
        source = original_flux.read(before, TINY)
        assert source.dynamic
        assert len(source.tensors) == len(before) == 136
        for block in ("transformer_blocks.1", "single_transformer_blocks.0"):
            for part in ("linear_t.weight", "norm.bias", "router.weight", "router.bias"):
                ours = source.tensors[f"{block}.token_router.{part}"]
                assert torch.equal(ours, before[f"{block}.token_selection.{part}"])

    def test_the_config_says_what_is_routed(self) -> None:
        config = original_flux.read(checkpoint("dyflux_official_tiny"), TINY).config
        assert (config["width"], config["token_router"]) == (False, "authors")
        assert "width" not in original_flux.read(checkpoint("flux_tiny_dev"), TINY).config

    def test_there_and_back(self) -> None:
        before = checkpoint("dyflux_official_tiny")
        after = original_flux.write(original_flux.read(before, TINY).tensors)
        assert set(after) == set(before)
        assert all(torch.equal(after[key], before[key]) for key in before)

    def test_the_rest_is_a_flux(self) -> None:
        source = original_flux.read(checkpoint("dyflux_official_tiny"), TINY)
        model = FluxTransformer2DModel(**diffusers_config(source.config))
        model.load_state_dict({key: source.tensors[key] for key in model.state_dict()})


class TestMistakes:
    def test_unknown_rotary_axes_are_asked_for(self) -> None:
        with pytest.raises(DyditError, match="axes_dims_rope") as error:
            original_flux.read(checkpoint("flux_tiny_dev"), Hints())
        assert "16 channels" in error.value.what

    @pytest.mark.parametrize("axes", [(4, 6, 8), (5, 5, 6), (16,), (8, 8)])
    def test_rotary_axes_that_do_not_fit(self, axes: tuple[int, ...]) -> None:
        with pytest.raises(DyditError, match="add up"):
            original_flux.read(checkpoint("flux_tiny_dev"), Hints(axes_dims_rope=axes))

    def test_a_config_beside_the_weights_tells_them(self) -> None:
        hints = Hints(config={"axes_dims_rope": [4, 6, 6]})
        assert original_flux.read(checkpoint("flux_tiny_dev"), hints).config["axes_dims_rope"] == (4, 6, 6)

    def test_heads_are_told_by_the_file(self) -> None:
        hints = Hints(num_heads=8, axes_dims_rope=(4, 6, 6))
        with pytest.raises(DyditError, match="4 attention heads, not 8"):
            original_flux.read(checkpoint("flux_tiny_dev"), hints)

    @pytest.mark.parametrize("name", STATIC)
    def test_missing_tensor_is_named(self, name: str) -> None:
        tensors = checkpoint(name)
        del tensors["double_blocks.1.txt_attn.qkv.bias"]
        with pytest.raises(DyditError, match=r"double_blocks\.1\.txt_attn\.qkv\.bias"):
            original_flux.read(tensors, TINY)

    def test_leftover_tensor_is_named(self) -> None:
        with pytest.raises(DyditError, match=r"double_blocks\.0\.extra"):
            original_flux.read(checkpoint("flux_tiny_dev") | {"double_blocks.0.extra": torch.zeros(1)}, TINY)

    def test_missing_block_is_counted(self) -> None:
        tensors = {
            key: value
            for key, value in checkpoint("flux_tiny_dev").items()
            if not key.startswith("single_blocks.0.")
        }
        with pytest.raises(DyditError, match="holds 1 of the 'single_blocks', the last of which is number 1"):
            original_flux.read(tensors, TINY)

    def test_a_fused_tensor_that_is_too_short(self) -> None:
        tensors = checkpoint("flux_tiny_dev")
        tensors["single_blocks.0.linear1.weight"] = tensors["single_blocks.0.linear1.weight"][:100]
        with pytest.raises(DyditError, match=r"single_blocks\.0\.linear1\.weight"):
            original_flux.read(tensors, TINY)

    def test_mlps_of_several_widths(self) -> None:
        tensors = checkpoint("flux_tiny_dev")
        tensors["double_blocks.0.img_mlp.0.weight"] = tensors["double_blocks.0.img_mlp.0.weight"][:-8]
        with pytest.raises(DyditError, match="several widths: 248, 256"):
            original_flux.read(tensors, TINY)
