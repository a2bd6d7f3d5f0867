"""What is saved loads again, bit for bit, whole and sharded; what is not whole does not load."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dydit_cli
from dydit_cli.artifacts import artifact_folder, load_for_training, load_model, model_config, save_model
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Family
from dydit_cli.families.registry import SIT
from tests.tiny import bits, each_family, predict, relative_difference, tiny_inputs, tiny_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        torch.equal(bits(first[key]), bits(second[key])) for key in first
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


class TestRoundTrip:
    @each_family
    @pytest.mark.parametrize("shard", ["5GB", "200KB", "1 KB", "0.1MB"])
    def test_bit_for_bit(self, family: Family, shard: str, tmp_path: Path) -> None:
        """Orders and routers included; the configuration builds the same geometry."""
        model = tiny_model(family, num_groups=4, always_on=False)
        save_model(model, tmp_path / "m", shard)
        assert (len(list((tmp_path / "m").glob("*.safetensors"))) == 1) == (shard == "5GB")
        loaded = load_model(tmp_path / "m", execution="dense")
        assert type(loaded) is type(model)
        assert same_weights(loaded, model)
        assert loaded.geometry == model.geometry
        arguments = tiny_inputs(model)
        with torch.no_grad():
            assert torch.equal(bits(predict(loaded, *arguments)), bits(predict(model, *arguments)))

    @each_family
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("shard", ["5GB", "100KB"])
    def test_diffusers_own_loader(
        self, family: Family, low_cpu_mem_usage: bool, shard: str, tmp_path: Path
    ) -> None:
        """Its low-memory path bypasses load_state_dict, so that nothing may depend on hooks there."""
        model = tiny_model(family)
        model.save_pretrained(tmp_path / "m", max_shard_size=shard)
        loaded = type(model).from_pretrained(tmp_path / "m", low_cpu_mem_usage=low_cpu_mem_usage)
        assert same_weights(loaded, model)
        arguments = tiny_inputs(model)
        with torch.no_grad():
            compact = predict(loaded.set_execution("compact"), *arguments)
            assert relative_difference(compact, predict(model, *arguments)) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_cast_at_loading(self, folder: Path, dtype: torch.dtype) -> None:
        loaded = load_model(folder, torch_dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert {buffer.dtype for buffer in loaded.buffers()} == {torch.int64}
        source = tiny_model()
        assert torch.equal(loaded.blocks[1].mlp.channel_order, source.blocks[1].mlp.channel_order)
        assert loaded(*tiny_inputs(source)).sample.dtype == dtype

    def test_half_precision_files(self, tmp_path: Path) -> None:
        save_model(tiny_model().to(torch.bfloat16), tmp_path / "m")
        assert load_model(tmp_path / "m").dtype == torch.float32
        assert load_for_training(tmp_path / "m").dtype == torch.float32

    def test_saving_after_compact_use_saves_the_stored_layout(self, tmp_path: Path) -> None:
        model = tiny_model().set_execution("compact")
        with torch.no_grad():
            model(*tiny_inputs(model))
        model.plan([1.0, 2.0])
        save_model(model, tmp_path / "m")
        assert same_weights(load_model(tmp_path / "m"), tiny_model())

    def test_what_load_model_gives(self, folder: Path) -> None:
        model = dydit_cli.load_model(folder, keep_bias=math.inf)
        assert not model.training
        assert model.execution == "compact"
        assert model.keep_bias == math.inf
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert dydit_cli.load_model(str(folder), execution="static", device="cpu").execution == "static"
        with pytest.raises(DyditError, match="execution"):
            load_model(folder, execution="fast")

    def test_what_load_for_training_gives(self, folder: Path) -> None:
        model = load_for_training(folder)
        assert model.training
        assert model.execution == "dense"
        fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert fixed == ["pos_embed"]

    def test_a_pipeline_export_and_its_native_convention(self, tmp_path: Path) -> None:
        """Stored for pipelines: t counts down from 1000 and the prediction points to the noise."""
        native = tiny_model("sit")
        family = SIT
        pipeline = family.pipeline_class(**native.config)
        pipeline.load_state_dict(native.state_dict())
        save_model(pipeline, tmp_path / "e" / "transformer")
        images, times, labels = tiny_inputs(native)
        with torch.no_grad():
            expected = native(images, times, labels).sample
            stored = load_model(tmp_path / "e", execution="dense")
            assert type(stored) is family.pipeline_class
            assert relative_difference(-stored(images, (1 - times) * 1000, labels).sample, expected) < 1e-4
            read = load_model(tmp_path / "e", execution="dense", convention="native")
            assert torch.equal(read(images, times, labels).sample, expected)
            assert type(load_for_training(tmp_path / "e")) is family.model_class

    def test_an_unknown_convention_is_refused(self, folder: Path) -> None:
        with pytest.raises(DyditError, match="nativ"):
            load_model(folder, convention="nativ")


class Evil:
    """Unpickles by creating a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.pop(key)


def replaced(key: str, tensor: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({key: tensor})


DAMAGES = {
    "no router bias": without("blocks.1.token_router.score.bias"),
    "no weight": without("blocks.0.attn.qkv.weight"),
    "no position table": without("pos_embed"),
    "no order": without("blocks.1.mlp.channel_order"),
    "another shape": replaced("pos_embed", torch.zeros(1, 4, 48)),
    "a head twice in the order": replaced("blocks.0.attn.head_order", torch.tensor([0, 1, 2, 3, 4, 4])),
    "an order beyond the heads": replaced("blocks.0.attn.head_order", torch.tensor([0, 1, 2, 3, 4, 6])),
    "a negative order": replaced("blocks.2.mlp.channel_order", torch.arange(192) - 1),
    "a foreign weight": replaced("blocks.0.attn.q_norm.weight", torch.ones(8)),
}


class TestDamage:
    @pytest.mark.parametrize("damage", list(DAMAGES))
    @pytest.mark.parametrize("loader", [load_model, load_for_training])
    def test_tensors(self, folder: Path, damage: str, loader: Callable[[Path], Any]) -> None:
        """Diffusers only warns of missing weights and leaves them unset; a model must be whole or not load."""
        state = load_file(folder / WEIGHTS)
        DAMAGES[damage](state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(DyditError) as error:
            loader(folder)
        assert str(folder) in error.value.what

    @pytest.mark.parametrize("size", [0, 7, 200, 5000, -1])
    def test_a_weight_file_cut_short(self, folder: Path, size: int) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(DyditError, match="cannot be loaded"):
            load_model(folder)

    def test_no_weight_file(self, folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        with pytest.raises(DyditError, match="cannot be loaded"):
            load_model(folder)

    def test_a_pickle_in_place_of_the_weights_is_not_run(self, folder: Path, tmp_path: Path) -> None:
        """Diffusers would fall back to .bin files; ours are safetensors only."""
        (folder / WEIGHTS).unlink()
        torch.save(
            tiny_model().state_dict() | {"x": Evil(tmp_path / "marker")},
            folder / "diffusion_pytorch_model.bin",
        )
        with pytest.raises(DyditError, match="cannot be loaded"):
            load_model(folder)
        assert not (tmp_path / "marker").exists()
        torch.save(tiny_model().state_dict(), folder / "diffusion_pytorch_model.bin")
        with pytest.raises(DyditError, match="cannot be loaded"):
            load_model(folder)

    @pytest.mark.parametrize("cut", [None, 100])
    def test_a_shard_missing_or_cut_short(self, tmp_path: Path, cut: int | None) -> None:
        save_model(tiny_model(), tmp_path / "m", "100KB")
        shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
        data = shard.read_bytes()
        shard.unlink()
        if cut is not None:
            shard.write_bytes(data[:cut])
        with pytest.raises(DyditError, match="cannot be loaded"):
            load_model(tmp_path / "m")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "not a model's configuration"),
            ("[]", "not a model's configuration"),
            ("{}", "not a model's configuration"),
            ('{"_class_name": "DiTTransformer2DModel"}', "not a dynamic model"),
            ('{"_class_name": null}', "not a dynamic model"),
        ],
    )
    def test_config(self, folder: Path, content: str, words: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(DyditError, match=words):
            load_model(folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_size": 64},
            {"num_attention_heads": 5},
            {"num_layers": 2},
            {"hidden_size": "wide"},
            {"num_groups": -1},
            {"patch_size": 0},
            {"always_on": False},
        ],
    )
    def test_a_config_that_does_not_fit(self, folder: Path, change: dict[str, Any]) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DyditError):
            load_model(folder)

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(DyditError, match="no model at"):
            load_model(tmp_path)
        with pytest.raises(DyditError, match="No such folder"):
            load_model(tmp_path / "nowhere")
        (tmp_path / "checkpoints").mkdir()
        with pytest.raises(DyditError, match="--resume"):
            load_model(tmp_path)

    def test_config_names_the_class(self, folder: Path) -> None:
        assert model_config(folder)["_class_name"] == "DyDiTTransformer2DModel"


class TestSizes:
    @pytest.mark.parametrize("size", ["", "5", "GB", "200B", "5 PB", "-1GB", "1KiB", "5GB\n", "1e3MB"])
    def test_a_wrong_size_is_refused_before_writing(self, tmp_path: Path, size: str) -> None:
        with pytest.raises(DyditError, match="shard size"):
            save_model(tiny_model(), tmp_path / "m", size)
        assert not (tmp_path / "m").exists()

    def test_saving_onto_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "m").write_text("precious")
        with pytest.raises(DyditError):
            save_model(tiny_model(), tmp_path / "m")
        assert (tmp_path / "m").read_text() == "precious"


LIMITED = """
import resource, sys
from pathlib import Path
from dydit_cli.artifacts import artifact_folder, save_model
from dydit_cli.errors import DyditError
from tests.tiny import tiny_model
model = tiny_model()
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with artifact_folder(sys.argv[1], overwrite=True) as folder:
        save_model(model, folder, sys.argv[3])
except DyditError as error:
    print(error.what, error.why, error.fix, sep="|")
"""


class TestFileSizeLimit:
    @pytest.mark.skipif(sys.platform == "win32", reason="no file-size limits there")
    def test_a_real_limit_leaves_the_old_artifact(self, folder: Path, repository: Path) -> None:
        """In a process of its own, whose system refuses files beyond 64 KB: the weights need 900."""
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        result = subprocess.run(
            [sys.executable, "-c", LIMITED, str(folder), "65536", "5GB"],
            cwd=repository,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        what, why, fix = result.stdout.strip().split("|")
        assert what == f"{folder} could not be written: a file-size limit was reached."
        assert "File too large" in why
        assert "untouched" in fix
        assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    def test_a_full_disk_in_the_middle_of_shards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import safetensors.torch

        written, save = [], safetensors.torch.save_file

        def filling(tensors: dict[str, torch.Tensor], filename: str, **options: Any) -> None:
            if len(written) == 2:
                raise OSError(28, "No space left on device")
            written.append(filename)
            save(tensors, filename, **options)

        monkeypatch.setattr(safetensors.torch, "save_file", filling)
        out = tmp_path / "runs" / "c"
        with pytest.raises(DyditError, match="the disk is full"), artifact_folder(out) as folder:
            save_model(tiny_model(), folder, "100KB")
        assert len(written) == 2
        assert list(out.parent.iterdir()) == []
        shutil.rmtree(out.parent)
