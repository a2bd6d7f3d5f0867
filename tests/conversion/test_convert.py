"""Conversion end to end, on the shipped models and on the authors' dynamic file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dydit_cli
from dydit_cli.errors import DyditError

PARITY = Path(__file__).parent.parent / "parity"


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_shipped_model_becomes_an_artifact_that_loads(family: str, tmp_path: Path) -> None:
    report = dydit_cli.convert(f"builtin:{family}_fmnist", out=tmp_path / "c")
    assert report.family == family
    assert report.verification.weights == 0
    assert report.verification.dense == 0
    assert report.verification.compact < 1e-5
    assert {file.name for file in (tmp_path / "c").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "importance.json",
        "importance.safetensors",
        "manifest.json",
        "report.json",
    }
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["stage"] == "convert"
    assert manifest["settings"]["num_heads"] == 8
    model = dydit_cli.load_model(tmp_path / "c")
    assert (model.execution, model.training, model.family) == ("compact", False, family)


def test_the_stored_weights_are_the_source_bit_for_bit_and_in_its_order(tmp_path: Path) -> None:
    dydit_cli.convert("builtin:dit_fmnist", out=tmp_path / "c", importance="random", seed=5)
    stored = load_file(tmp_path / "c" / "diffusion_pytorch_model.safetensors")
    source = torch.load(
        Path(dydit_cli.__file__).parent / "assets" / "models" / "dit_fmnist.pt", weights_only=True
    )
    assert all(torch.equal(stored[key], source[key]) for key in source)
    assert stored["blocks.0.attn.head_order"].tolist() != list(range(8))


def test_the_authors_dynamic_file_is_imported_as_it_is(tmp_path: Path) -> None:
    case = PARITY / "dydit_official_tiny"
    report = dydit_cli.convert(case / "checkpoint.pt", out=tmp_path / "c", num_heads=6)
    assert (report.family, report.importance) == ("dit", "imported")
    assert not (tmp_path / "c" / "importance.safetensors").exists()
    expected = load_file(case / "io.safetensors")
    model = dydit_cli.load_model(tmp_path / "c")
    with torch.no_grad():
        output, routing = model.denoise(expected["x"], expected["t"], expected["y"])
    assert (output - expected["out"]).abs().max() < 2e-5
    assert torch.equal(routing.heads, expected["attn_masks"])


def test_sharded_conversion_loads_again(tmp_path: Path) -> None:
    dydit_cli.convert("builtin:sit_fmnist", out=tmp_path / "c", max_shard_size="2MB")
    assert len(list((tmp_path / "c").glob("*-of-*.safetensors"))) > 1
    whole = dydit_cli.convert("builtin:sit_fmnist", out=tmp_path / "w")
    assert whole.params == dydit_cli.convert("builtin:sit_fmnist", out=tmp_path / "w", overwrite=True).params
    assert dydit_cli.load_model(tmp_path / "c").geometry == dydit_cli.load_model(tmp_path / "w").geometry


def test_scores_of_an_earlier_conversion_give_the_same_order(tmp_path: Path) -> None:
    dydit_cli.convert("builtin:dit_fmnist", out=tmp_path / "a", importance="random", seed=9)
    dydit_cli.convert("builtin:dit_fmnist", out=tmp_path / "b", importance=str(tmp_path / "a"))
    first = load_file(tmp_path / "a" / "importance.safetensors")
    second = load_file(tmp_path / "b" / "importance.safetensors")
    assert torch.equal(first["channel_order"], second["channel_order"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "missing.pt"}, "There is no checkpoint at missing.pt"),
        ({"checkpoint": "builtin:dit_fmnits"}, "did you mean 'dit_fmnist'"),
        ({"checkpoint": "builtin:dit_fmnist", "num_groups": 7}, "near divisors of 512"),
        ({"checkpoint": "builtin:dit_fmnist", "importance": "taylor"}, "needs data"),
        ({"checkpoint": "builtin:dit_fmnist", "max_shard_size": "big"}, "not a shard size"),
        (
            {"checkpoint": PARITY / "dit_tiny" / "checkpoint.pt", "num_heads": 6},
            "--family dit or --family sit",
        ),
        ({"checkpoint": PARITY / "dit_tiny" / "checkpoint.pt", "family": "dit"}, "--num-heads"),
        (
            {"checkpoint": PARITY / "dydit_official_tiny" / "checkpoint.pt", "num_heads": 6, "family": "sit"},
            "--family dit",
        ),
        ({"checkpoint": PARITY / "dydit_official_tiny" / "checkpoint.pt", "num_heads": 8}, "--num-heads 6"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DyditError, match=message):
        dydit_cli.convert(**arguments, out=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = torch.load(PARITY / "dit_tiny" / "checkpoint.pt", weights_only=True)
    tensors["blocks.2.mlp.fc1.weight"] = tensors["blocks.2.mlp.fc1.weight"][:-1]
    torch.save(tensors, tmp_path / "wrong.pt")
    with pytest.raises(DyditError, match=r"blocks.2.mlp.fc1.weight is \(191, 48\), not \(192, 48\)"):
        dydit_cli.convert(tmp_path / "wrong.pt", family="dit", num_heads=6, out=tmp_path / "c")


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious").write_text("x")
    with pytest.raises(DyditError, match="--overwrite"):
        dydit_cli.convert("builtin:dit_fmnist", out=tmp_path / "c")
    assert (tmp_path / "c" / "precious").read_text() == "x"


def test_an_artifact_is_not_converted_again(tmp_path: Path) -> None:
    dydit_cli.convert("builtin:dit_fmnist", out=tmp_path / "c")
    with pytest.raises(DyditError, match="is dynamic already"):
        dydit_cli.convert(tmp_path / "c", out=tmp_path / "d")


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    tensors = torch.load(PARITY / "dit_tiny" / "checkpoint.pt", weights_only=True)
    tensors["blocks.1.attn.proj.bias"][3] = float("nan")
    torch.save(tensors, tmp_path / "broken.pt")
    with pytest.raises(DyditError, match=r"blocks.1.attn.proj.bias"):
        dydit_cli.convert(tmp_path / "broken.pt", family="dit", num_heads=6, out=tmp_path / "c")
