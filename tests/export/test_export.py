"""What every format refuses, and that nothing half-written stays behind."""

from __future__ import annotations

import errno
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_cli.errors import DyditError
from dydit_cli.export import export as exporting
from dydit_cli.export.lineage import lineage_of
from tests.export.artifacts import converted, exported, trained

FORMATS = pytest.mark.parametrize("kind", ["diffusers", "original", "static"])


@FORMATS
def test_a_folder_without_a_model(kind: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for model in ("absent", "other"):
        with pytest.raises(DyditError, match="There is no model at"):
            exported(tmp_path / model, tmp_path / "e", kind)
    assert not (tmp_path / "e").exists()


@FORMATS
def test_what_is_there_stays_unless_it_is_to_be_replaced(kind: str, tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine.txt").write_text("mine")
    with pytest.raises(DyditError, match="exists already"):
        exported(model, tmp_path / "e", kind)
    assert [file.name for file in (tmp_path / "e").iterdir()] == ["mine.txt"]
    exported(model, tmp_path / "e", kind, overwrite=True)
    assert not (tmp_path / "e" / "mine.txt").exists()


def test_an_export_never_replaces_its_source(tmp_path: Path) -> None:
    model = trained(tmp_path / "runs" / "t", in_channels=1)
    for out in (model, tmp_path / "runs"):
        with pytest.raises(DyditError, match="the model that is to be exported"):
            exported(model, out, overwrite=True)
    assert (model / "config.json").is_file()


@FORMATS
def test_damaged_weights(kind: str, tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    weights = model / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DyditError, match="cannot be"):
        exported(model, tmp_path / "e", kind)
    assert sorted(tmp_path.iterdir()) == [model]


@FORMATS
def test_too_little_space_is_said_before_anything_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    with pytest.raises(DyditError, match="are free"):
        exported(model, tmp_path / "e", kind)
    assert sorted(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("kind", ["original", "static"])
def test_a_full_disk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path / "t", in_channels=1)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(DyditError, match="the disk is full"):
        exported(model, tmp_path / "e", kind)
    assert sorted(tmp_path.iterdir()) == [model]


def test_a_file_that_does_not_read_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    save = torch.save

    def spoil(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save({key: tensor + 1 for key, tensor in tensors.items()}, path)

    monkeypatch.setattr(torch, "save", spoil)
    with pytest.raises(DyditError, match="does not hold what was written"):
        exported(model, tmp_path / "e", "static")
    assert sorted(tmp_path.iterdir()) == [model]


def test_the_recipe_is_kept_and_work_is_told(tmp_path: Path) -> None:
    from dydit_cli.recipe.schema import ExportSection

    told: list[str] = []
    section = ExportSection(model=str(trained(tmp_path / "t", in_channels=1)), out=tmp_path / "e")
    report = exporting.export(section, recipe_yaml="schema: 1\n", on_progress=told.append)
    assert (tmp_path / "e" / "recipe.yaml").read_text() == "schema: 1\n"
    assert "recipe.yaml" in report.files
    assert len(told) == 3


def test_no_compiled_code_is_left_in_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    model = trained(tmp_path / "t", in_channels=1)
    report = exported(model, tmp_path / "e")
    assert "transformer/modeling_dydit.py" in report.files
    assert not [name for name in report.files if "__pycache__" in name]
    assert not sys.dont_write_bytecode


def test_lineage_goes_back_to_the_checkpoint_and_survives_gaps(tmp_path: Path) -> None:
    converted(tmp_path / "c", dtype=torch.float16)
    known = lineage_of(tmp_path / "c")
    assert known.base == str(tmp_path / "c.pt")
    assert known.dtypes == {"*": "float16"}
    assert (known.ratio, known.steps) == (None, None)
    orphan = lineage_of(trained(tmp_path / "t"))
    assert (orphan.base, orphan.ratio, orphan.steps) == (None, 0.512, 7)
    (tmp_path / "t" / "manifest.json").write_text("{")
    assert lineage_of(tmp_path / "t").ratio is None
