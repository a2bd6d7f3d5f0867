"""Ordered width and budgets in exports: they run in a pipeline folder, and no layout of others misreads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.artifacts import load_model
from dydit_cli.errors import DyditError
from tests.export.artifacts import exported, trained
from tests.tiny import tiny_inputs

BUDGETS = {"budgets": [0.3, 1.0], "default_budget": 0.5}


def test_an_export_runs_at_its_budget(tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1, **BUDGETS)
    report = exported(model, tmp_path / "e", budget=0.9)
    assert report.max_difference < 1e-5
    transformer = load_model(tmp_path / "e")
    assert transformer.budget == 0.9
    assert transformer.config["default_budget"] == 0.9
    inputs = tiny_inputs(transformer)
    with torch.no_grad():
        found = transformer(*inputs).sample
        assert torch.allclose(found, load_model(model, budget=0.9)(*inputs).sample, atol=1e-5)
        assert not torch.allclose(found, load_model(model)(*inputs).sample, atol=1e-3)


def test_an_export_keeps_ordered_width(tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1, width="ordered")
    assert exported(model, tmp_path / "e").max_difference < 1e-5
    assert load_model(tmp_path / "e").config["width"] == "ordered"


@pytest.mark.parametrize("changes", [{"width": "ordered"}, BUDGETS], ids=["ordered", "budgets"])
def test_the_original_layout_is_refused_and_the_static_one_is_clean(
    changes: dict[str, object], tmp_path: Path
) -> None:
    model = trained(tmp_path / "t", in_channels=1, **changes)
    with pytest.raises(DyditError, match="original layout"):
        exported(model, tmp_path / "o", "original")
    exported(model, tmp_path / "s", "static")
    (file,) = (tmp_path / "s").glob("model.*")
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert not [key for key in tensors if "router" in key]


def test_a_budget_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    with pytest.raises(DyditError, match="no budgets"):
        exported(model, tmp_path / "e", budget=0.5)
    with pytest.raises(DyditError, match="knows no budget"):
        exported(model, tmp_path / "e", "static", budget=0.5)
