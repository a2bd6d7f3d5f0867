"""Opening without reading: shapes from headers, rows alone, all-in-one files, fp8, shards, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.checkpoints import open_checkpoint, read_checkpoint
from dydit_cli.checkpoints.layout import Rearranged, Rows
from dydit_cli.checkpoints.lazy import LazyTensors, MemoryTensors, TensorSpec
from dydit_cli.errors import DyditError


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "img_in.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "img_in.bias": torch.randn(6, generator=generator),
        "steps": torch.tensor(3),
    }


def opened(path: Path) -> LazyTensors:
    tensors = open_checkpoint(path).tensors
    assert isinstance(tensors, LazyTensors)
    return tensors


def same(actual: LazyTensors, expected: dict[str, Tensor]) -> bool:
    return set(actual) == set(expected) and all(torch.equal(actual[key], expected[key]) for key in expected)


class TestContainers:
    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
    def test_shapes_types_rows_and_tensors(
        self, tmp_path: Path, tensors: dict[str, Tensor], name: str
    ) -> None:
        path = tmp_path / name
        save_file(tensors, path) if name.endswith("safetensors") else torch.save({"ema": tensors}, path)
        read = opened(path)
        assert read.specs == {
            "img_in.weight": TensorSpec((6, 4), torch.bfloat16),
            "img_in.bias": TensorSpec((6,), torch.float32),
            "steps": TensorSpec((), torch.int64),
        }
        assert read.spec("img_in.weight").nbytes == 48
        assert same(read, tensors)
        assert torch.equal(read.rows("img_in.weight", 2, 5), tensors["img_in.weight"][2:5])

    def test_old_torch_files_cannot_be_mapped_and_are_read(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert same(opened(tmp_path / "old.pt"), tensors)

    def test_shards(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        write_shards(tmp_path, tensors)
        assert same(opened(tmp_path), tensors)
        assert same(opened(tmp_path), dict(read_checkpoint(tmp_path).tensors))

    def test_a_shard_without_its_tensor_is_named(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        write_shards(tmp_path, tensors)
        save_file({"other": torch.zeros(1)}, tmp_path / "model-00001.safetensors")
        with pytest.raises(DyditError, match=r"model-00001\.safetensors does not hold 'img_in\.weight'"):
            open_checkpoint(tmp_path)

    def test_a_pipelines_folder_gives_its_transformer(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        (tmp_path / "transformer").mkdir()
        (tmp_path / "vae").mkdir()
        (tmp_path / "model_index.json").write_text("{}")
        save_file(tensors, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
        (tmp_path / "transformer" / "config.json").write_text('{"axes_dims_rope": [4, 6, 6]}')
        read = open_checkpoint(tmp_path)
        assert set(read.tensors) == set(tensors)
        assert read.config["axes_dims_rope"] == [4, 6, 6]

    def test_a_file_of_another_type_is_refused_at_once(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        save_file(tensors, tmp_path / "a.safetensors")
        content = (tmp_path / "a.safetensors").read_bytes()
        (tmp_path / "b.safetensors").write_bytes(content[:-3])
        with pytest.raises(DyditError, match="cut short or damaged"):
            open_checkpoint(tmp_path / "b.safetensors")


def test_asking_for_a_key_reads_nothing() -> None:
    class Shapes(MemoryTensors):
        def __getitem__(self, key: str) -> Tensor:
            raise AssertionError(f"{key} was read")

    tensors = Shapes({"a": torch.zeros(2)})
    assert "a" in tensors
    assert "b" not in tensors
    rearranged = Rearranged(tensors, {"c": (Rows("a"),)})
    assert "c" in rearranged
    assert "a" not in rearranged


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = {key: f"model-{index + 1:05d}.safetensors" for index, key in enumerate(tensors)}
    for key, name in weight_map.items():
        save_file({key: tensors[key]}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class TestAllInOne:
    def test_only_the_diffusion_model_is_taken(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        others = {
            "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": torch.ones(3),
            "vae.decoder.conv_in.weight": torch.ones(2, 2),
        }
        inside = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
        save_file(others | inside, tmp_path / "a.safetensors")
        assert same(opened(tmp_path / "a.safetensors"), tensors)
        assert same(
            opened(tmp_path / "a.safetensors"), dict(read_checkpoint(tmp_path / "a.safetensors").tensors)
        )

    def test_a_text_encoder_that_is_packed_does_not_refuse_the_file(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        other = {"text_encoders.t5.block.0.weight.absmax": torch.ones(3)}
        inside = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
        save_file(other | inside, tmp_path / "a.safetensors")
        assert same(opened(tmp_path / "a.safetensors"), tensors)


class TestFloat8:
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_plain(self, tmp_path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Every 8-bit float is a bf16 number, so that nothing is lost."""
        stored = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()
        }
        save_file(stored, tmp_path / "a.safetensors")
        checkpoint = open_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.quantisation == "fp8"
        read = opened(tmp_path / "a.safetensors")
        assert read.spec("img_in.bias") == TensorSpec((6,), torch.bfloat16)
        for key in ("img_in.weight", "img_in.bias"):
            assert read[key].dtype == torch.bfloat16
            assert torch.equal(read[key].float(), stored[key].float())
        assert read.spec("steps").dtype == torch.int64

    @pytest.mark.parametrize(
        ("ending", "extra"), [("scale_weight", "scale_input"), ("weight_scale", "input_scale")]
    )
    @pytest.mark.parametrize("rows", [False, True], ids=["per tensor", "per row"])
    def test_scaled(
        self, tmp_path: Path, tensors: dict[str, Tensor], ending: str, extra: str, rows: bool
    ) -> None:
        scale = torch.linspace(0.5, 3.0, 6)[:, None] if rows else torch.tensor(0.37)
        quantised = tensors["img_in.weight"].to(torch.float8_e4m3fn)
        stored = {
            "model.diffusion_model.img_in.weight": quantised,
            "model.diffusion_model.img_in.bias": tensors["img_in.bias"],
            f"model.diffusion_model.img_in.{ending}": scale,
            f"model.diffusion_model.img_in.{extra}": torch.tensor(1.0),
            "model.diffusion_model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        }
        save_file(stored, tmp_path / "a.safetensors")
        checkpoint = open_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.quantisation == "scaled fp8"
        read = opened(tmp_path / "a.safetensors")
        assert list(read) == ["img_in.bias", "img_in.weight"]
        expected = (quantised.float() * scale).bfloat16()
        assert torch.equal(read["img_in.weight"], expected)
        assert torch.equal(read.rows("img_in.weight", 3, 6), expected[3:6])
        assert read["img_in.bias"].dtype == torch.float32
        assert f"img_in.{ending}" not in read
        assert "scaled_fp8" not in read

    def test_a_marker_alone_means_plain(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        stored = {
            "img_in.weight": tensors["img_in.weight"].to(torch.float8_e4m3fn),
            "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
        }
        save_file(stored, tmp_path / "a.safetensors")
        assert list(opened(tmp_path / "a.safetensors")) == ["img_in.weight"]

    def test_layers_that_say_their_format(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        stored = comfy_layer(tensors, "float8_e4m3fn")
        save_file(stored, tmp_path / "a.safetensors")
        assert list(opened(tmp_path / "a.safetensors")) == ["img_in.weight"]

    def test_scales_of_blocks_are_refused(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        stored = {
            "img_in.weight": tensors["img_in.weight"].to(torch.float8_e4m3fn),
            "img_in.weight_scale": torch.ones(3, 2),
        }
        save_file(stored, tmp_path / "a.safetensors")
        with pytest.raises(DyditError, match="one a row"):
            open_checkpoint(tmp_path / "a.safetensors")

    def test_a_scale_without_its_weight(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        save_file({**tensors, "lost.scale_weight": torch.tensor(1.0)}, tmp_path / "a.safetensors")
        with pytest.raises(DyditError, match="belongs to no tensor"):
            open_checkpoint(tmp_path / "a.safetensors")


def comfy_layer(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    described = json.dumps({"format": kind}).encode()
    return {
        "img_in.weight": tensors["img_in.weight"].to(torch.float8_e4m3fn),
        "img_in.weight_scale": torch.tensor(2.0),
        "img_in.comfy_quant": torch.tensor(list(described), dtype=torch.uint8),
    }


class TestRefused:
    @pytest.mark.parametrize(
        ("extra", "title"),
        [
            ({"a.weight.absmax": torch.ones(2)}, "bitsandbytes 4-bit"),
            ({"a.weight.quant_state.bitsandbytes__nf4": torch.ones(2).byte()}, "bitsandbytes 4-bit"),
            ({"a.SCB": torch.ones(2)}, "bitsandbytes int8"),
            ({"a.qweight": torch.ones(2).int(), "a.wscales": torch.ones(2)}, "SVDQuant"),
            ({"a.qweight": torch.ones(2).int(), "a.qzeros": torch.ones(2).int()}, "group-quantised"),
            ({"a.weight_scale_inv": torch.ones(2)}, "group-quantised"),
            ({"a.weight": torch.ones(2).byte()}, "integer"),
        ],
        ids=["nf4", "nf4 state", "int8", "svdquant", "gptq", "blocks", "bytes"],
    )
    def test_what_it_is_and_what_to_bring(
        self, tmp_path: Path, tensors: dict[str, Tensor], extra: dict[str, Tensor], title: str
    ) -> None:
        save_file(tensors | extra, tmp_path / "a.safetensors")
        for read in (open_checkpoint, read_checkpoint):
            with pytest.raises(DyditError, match=title) as error:
                read(tmp_path / "a.safetensors")
            assert "bf16" in error.value.fix
            assert next(iter(extra)).split(".")[0] in error.value.why

    def test_layers_that_say_another_format(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        save_file(comfy_layer(tensors, "nvfp4"), tmp_path / "a.safetensors")
        with pytest.raises(DyditError, match="nvfp4"):
            open_checkpoint(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("name", ["flux1-dev-Q4_K_S.gguf", "renamed.safetensors"])
    def test_gguf(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
        with pytest.raises(DyditError, match="GGUF") as error:
            open_checkpoint(tmp_path / name)
        assert "safetensors" in error.value.fix
