"""LoRAs of several trainers merged into a FLUX: as diffusers loads and fuses them, and nothing left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.conversion.lora import merge_loras, parse_lora, read_lora
from dydit_cli.errors import DyditError

HIDDEN = 32
LAYERS = ("transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_out", "x_embedder")


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
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**(config | changes))


def state() -> dict[str, Tensor]:
    return dict(tiny_flux().state_dict())


def random(*shape: int, seed: int = 1) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(layer: str, rank: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(A, B) that fit a layer of the tiny model."""
    rows, columns = state()[f"{layer}.weight"].shape
    return random(rank, columns, seed=seed), random(rows, rank, seed=seed + 100)


def diffusers_lora(prefix: str = "transformer.") -> dict[str, Tensor]:
    content = {}
    for index, layer in enumerate(LAYERS):
        down, up = pair(layer, rank=2 + index, seed=index)
        content |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    return content


def changed(merged: Any, base: dict[str, Tensor]) -> set[str]:
    return {key for key in base if not torch.equal(merged[key], base[key])}


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, atol=1e-6, rtol=0)


class TestFormats:
    def test_as_diffusers_saves_it(self, tmp_path: Path) -> None:
        save_file(diffusers_lora(), tmp_path / "a.safetensors")
        merged, reports = merge_loras(state(), [f"{tmp_path / 'a.safetensors'}:0.7"])
        assert changed(merged, state()) == {f"{layer}.weight" for layer in LAYERS}
        for index, layer in enumerate(LAYERS):
            down, up = pair(layer, rank=2 + index, seed=index)
            assert close(merged[f"{layer}.weight"], state()[f"{layer}.weight"] + 0.7 * up @ down)
        assert (reports[0].layers, reports[0].scale, reports[0].left_out) == (3, 0.7, 0)

    def test_as_diffusers_fuses_it(self, tmp_path: Path) -> None:
        """The file of a real adapter with its own alpha, merged here and fused there."""
        model = tiny_flux()
        model.add_adapter(
            LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
        )
        layers = get_peft_model_state_dict(model)
        settings = {f"transformer.{key}": value for key, value in {"r": 4, "lora_alpha": 6}.items()}
        content = {f"transformer.{key}": value.contiguous() for key, value in layers.items()}
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        save_file(content, tmp_path / "a.safetensors", metadata=metadata)
        model.fuse_lora()
        model.unload_lora()
        merged, _ = merge_loras(state(), [str(tmp_path / "a.safetensors")])
        fused = dict(model.state_dict())
        assert set(fused) == set(merged)
        assert all(close(merged[key], fused[key]) for key in fused)
        assert len(changed(merged, state())) == 4

    def test_a_folder_of_peft(self, tmp_path: Path) -> None:
        save_file(diffusers_lora("base_model.model."), tmp_path / "adapter_model.safetensors")
        settings = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 1}, "use_rslora": False}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        updates = read_lora(tmp_path).updates
        assert {layer: update.scale for layer, update in updates.items()} == {
            LAYERS[0]: 1 / 2,
            LAYERS[1]: 8 / 3,
            LAYERS[2]: 8 / 4,
        }

    def test_alphas_beside_the_layers(self, tmp_path: Path) -> None:
        alphas = {f"transformer.{LAYERS[0]}.alpha": torch.tensor(4.0)}
        save_file(diffusers_lora() | alphas, tmp_path / "a.safetensors")
        updates = read_lora(tmp_path / "a.safetensors").updates
        assert updates[LAYERS[0]].scale == 2.0
        assert updates[LAYERS[1]].scale == 1.0

    @pytest.mark.parametrize("prefix", ["lora_unet_double_blocks_1_", "diffusion_model.double_blocks.1."])
    def test_kohya_and_comfy(self, tmp_path: Path, prefix: str) -> None:
        """A fused projection becomes three; alpha / r is in the file."""
        dot = "_" if "unet" in prefix else "."
        down, up = random(4, HIDDEN), random(3 * HIDDEN, 4, seed=2)
        other_down, other_up = random(2, HIDDEN, seed=3), random(4 * HIDDEN, 2, seed=4)
        qkv, mlp = f"{prefix}txt_attn{dot}qkv", f"{prefix}img_mlp{dot}0"
        content = {
            f"{qkv}.lora_down.weight": down,
            f"{qkv}.lora_up.weight": up,
            f"{qkv}.alpha": torch.tensor(2.0),
            f"{mlp}.lora_down.weight": other_down,
            f"{mlp}.lora_up.weight": other_up,
            f"{mlp}.alpha": torch.tensor(2.0),
        }
        save_file(content, tmp_path / "a.safetensors")
        merged, _ = merge_loras(state(), [str(tmp_path / "a.safetensors")])
        base, block = state(), "transformer_blocks.1."
        for index, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
            delta = 0.5 * up[index * HIDDEN : (index + 1) * HIDDEN] @ down
            key = f"{block}attn.{name}.weight"
            assert close(merged[key], base[key] + delta)
        key = f"{block}ff.net.0.proj.weight"
        assert close(merged[key], base[key] + other_up @ other_down)
        assert len(changed(merged, base)) == 4

    def test_single_blocks_of_kohya_at_full_width(self, tmp_path: Path) -> None:
        """diffusers' converter knows one width; its four parts stand in the order of the original's rows."""
        down, up = random(1, 3072), random(3 * 3072 + 12288, 1, seed=2)
        name = "lora_unet_single_blocks_37_linear1"
        save_file(
            {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors"
        )
        updates = read_lora(tmp_path / "a.safetensors").updates
        block = "single_transformer_blocks.37."
        assert list(updates) == [f"{block}attn.to_{letter}" for letter in "qkv"] + [f"{block}proj_mlp"]
        assert torch.equal(torch.cat([update.up for update in updates.values()]), up)

    def test_layers_of_the_original_with_lora_a_and_b(self, tmp_path: Path) -> None:
        down, up = random(4, HIDDEN), random(HIDDEN, 4, seed=2)
        content = {
            "double_blocks.0.img_attn.proj.lora_A.weight": down,
            "double_blocks.0.img_attn.proj.lora_B.weight": up,
        }
        save_file(content, tmp_path / "a.safetensors")
        merged, _ = merge_loras(state(), [str(tmp_path / "a.safetensors")])
        key = "transformer_blocks.0.attn.to_out.0.weight"
        assert close(merged[key], state()[key] + up @ down)

    def test_xlabs(self, tmp_path: Path) -> None:
        content = {
            "double_blocks.0.processor.qkv_lora1.down.weight": random(4, HIDDEN),
            "double_blocks.0.processor.qkv_lora1.up.weight": random(3 * HIDDEN, 4, seed=2),
            "single_blocks.0.processor.proj_lora.down.weight": random(4, 5 * HIDDEN, seed=3),
            "single_blocks.0.processor.proj_lora.up.weight": random(HIDDEN, 4, seed=4),
        }
        save_file(content, tmp_path / "a.safetensors")
        merged, _ = merge_loras(state(), [str(tmp_path / "a.safetensors")])
        names = [f"transformer_blocks.0.attn.to_{letter}.weight" for letter in "qkv"]
        assert changed(merged, state()) == {*names, "single_transformer_blocks.0.proj_out.weight"}

    def test_what_diffusers_would_load_is_what_is_merged(self, tmp_path: Path) -> None:
        """The converted keys are all used; none is added."""
        save_file(diffusers_lora(), tmp_path / "a.safetensors")
        theirs = FluxLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="a.safetensors")
        layers = {key.removeprefix("transformer.").split(".lora_")[0] for key in theirs}
        assert layers == set(read_lora(tmp_path / "a.safetensors").updates)


class TestMerging:
    def test_several_add_up(self, tmp_path: Path) -> None:
        save_file(diffusers_lora(), tmp_path / "a.safetensors")
        path = tmp_path / "a.safetensors"
        merged, reports = merge_loras(state(), [f"{path}:0.5", f"{path}:-0.25"])
        once, _ = merge_loras(state(), [f"{path}:0.25"])
        assert all(close(merged[key], once[key]) for key in once)
        assert len(reports) == 2

    def test_lazily_and_by_rows(self, tmp_path: Path) -> None:
        """Types stay, sums are taken in fp32, rows of the sum are the sum of rows, the base stays as it was."""
        save_file(diffusers_lora(), tmp_path / "a.safetensors")
        base = {key: value.bfloat16() for key, value in state().items()}
        before = {key: value.clone() for key, value in base.items()}
        merged, _ = merge_loras(base, [str(tmp_path / "a.safetensors")])
        key = f"{LAYERS[1]}.weight"
        down, up = pair(LAYERS[1], rank=3, seed=1)
        assert merged[key].dtype == torch.bfloat16
        assert torch.equal(merged[key], (base[key].float() + up @ down).bfloat16())
        assert torch.equal(merged.rows(key, 3, 9), merged[key][3:9])
        assert all(torch.equal(base[name], before[name]) for name in base)
        assert merged.specs == lazily(base).specs

    def test_biases(self, tmp_path: Path) -> None:
        content = diffusers_lora() | {f"transformer.{LAYERS[0]}.lora_B.bias": random(HIDDEN)}
        save_file(content, tmp_path / "a.safetensors")
        merged, _ = merge_loras(state(), [f"{tmp_path / 'a.safetensors'}:2"])
        key = f"{LAYERS[0]}.bias"
        assert close(merged[key], state()[key] + 2 * random(HIDDEN))

    def test_text_encoders_are_left_out_and_counted(self, tmp_path: Path) -> None:
        other = {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": random(2, 2)}
        save_file(diffusers_lora() | other, tmp_path / "a.safetensors")
        assert merge_loras(state(), [str(tmp_path / "a.safetensors")])[1][0].left_out == 1


class TestMistakes:
    def refused(self, tmp_path: Path, content: dict[str, Tensor], match: str) -> DyditError:
        save_file(content, tmp_path / "a.safetensors")
        with pytest.raises(DyditError, match=match) as error:
            merge_loras(state(), [str(tmp_path / "a.safetensors")])
        return error.value

    def test_a_block_that_the_model_lacks(self, tmp_path: Path) -> None:
        layer = "transformer_blocks.7.attn.to_q"
        down, up = random(2, HIDDEN), random(HIDDEN, 2)
        content = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        error = self.refused(tmp_path, diffusers_lora() | content, r"transformer_blocks\.7\.attn\.to_q")
        assert "matches nothing" in error.what

    @pytest.mark.parametrize(
        ("stray", "named"),
        [
            ("lora_unet_strange_layer.lora_down.weight", "lora_unet_strange_layer"),
            ("other.lora_down.weight", "other.lora_down.weight"),
            # Where both families of names are in a file, diffusers takes these and drops the others.
            ("transformer.strange", "lora_unet_double_blocks_0_img_attn_proj"),
        ],
    )
    def test_a_key_that_converters_drop_or_do_not_know(self, tmp_path: Path, stray: str, named: str) -> None:
        content = {
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": random(4, HIDDEN),
            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": random(HIDDEN, 4),
            stray: random(4, HIDDEN),
        }
        self.refused(tmp_path, content, named)

    def test_a_key_that_is_no_update(self, tmp_path: Path) -> None:
        content = diffusers_lora() | {"transformer.transformer_blocks.0.attn.norm_q.weight": random(16)}
        self.refused(tmp_path, content, r"norm_q\.weight")

    @pytest.mark.parametrize(
        ("key", "kind"), [("a.dora_scale", "DoRA"), ("a.hada_w1_a", "LoHa"), ("a.lokr_w1", "LoKr")]
    )
    def test_other_adapters(self, tmp_path: Path, key: str, kind: str) -> None:
        self.refused(tmp_path, diffusers_lora() | {key: random(2, 2)}, "plain LoRA")

    def test_half_an_update(self, tmp_path: Path) -> None:
        content = diffusers_lora()
        del content[f"transformer.{LAYERS[0]}.lora_B.weight"]
        assert "lora_B" in self.refused(tmp_path, content, "half of an update").why

    def test_another_width(self, tmp_path: Path) -> None:
        layer = f"transformer.{LAYERS[0]}"
        content = {f"{layer}.lora_A.weight": random(2, 48), f"{layer}.lora_B.weight": random(48, 2)}
        assert "(48, 48)" in self.refused(tmp_path, content, "does not fit the model").why

    def test_no_lora_at_all(self, tmp_path: Path) -> None:
        self.refused(tmp_path, {"model.weight": random(2, 2)}, r"model\.weight")

    def test_missing_file(self) -> None:
        with pytest.raises(DyditError, match="no LoRA at"):
            merge_loras(state(), ["absent.safetensors:0.5"])


class TestScale:
    def test_split(self) -> None:
        assert parse_lora("a.safetensors:0.8") == (Path("a.safetensors"), 0.8)
        assert parse_lora("a.safetensors") == (Path("a.safetensors"), 1.0)
        assert parse_lora("folder/a:b.safetensors:-1") == (Path("folder/a:b.safetensors"), -1.0)

    def test_a_file_with_a_colon_in_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "a:2").touch()
        assert parse_lora(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)

    @pytest.mark.parametrize("text", ["a.safetensors:much", "a.safetensors:", "a.safetensors:nan"])
    def test_no_number(self, text: str) -> None:
        with pytest.raises(DyditError, match="not a LoRA with its scale"):
            parse_lora(text)
