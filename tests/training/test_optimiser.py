"""The optimisers: moments in 8 bits where their package is installed, and clear words where it is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dydit_cli.errors import DyditError
from dydit_cli.training import fine_tune
from dydit_cli.training.optimiser import make_optimiser, state_by_name
from tests.objectives.base_models import tiny_model
from tests.training.runs import settings_for

RATES: dict[str, Any] = {"learning_rate": 1e-4, "router_learning_rate": 1e-3, "weight_decay": 0.0}


def test_8_bits_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(DyditError, match="adamw8bit is not installed") as error:
        make_optimiser(tiny_model(), kind="adamw8bit", **RATES)
    assert "pip install bitsandbytes" in error.value.fix


def test_counts_and_shared_tables_can_be_stored(tmp_path: Path) -> None:
    """The form of bitsandbytes' state: a plain number of steps, and one table of values for all parameters."""
    model = tiny_model()
    optimiser = make_optimiser(model, **RATES)
    table = torch.linspace(-1, 1, 256)
    parameters = list(model.final_layer.parameters())
    for parameter in parameters:
        optimiser.state[parameter] = {"step": 3, "state1": parameter.new_zeros(4).byte(), "qmap1": table}
    tensors = state_by_name(optimiser, model)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    stored = load_file(tmp_path / "optimizer.safetensors")
    assert len(stored) == 3 * len(parameters)
    assert stored["final_layer.linear.weight:step"].item() == 3
    assert stored["final_layer.linear.weight:step"].dtype == torch.int64
    for name in ("final_layer.linear.weight:qmap1", "final_layer.linear.bias:qmap1"):
        assert torch.equal(stored[name], table)


def test_a_run_with_8_bits_resumes_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    keys: dict[str, Any] = {"optimiser": "adamw8bit", "evaluate_every": 0}
    fine_tune(settings_for(tmp_path, out=str(tmp_path / "whole"), steps=4, **keys))
    fine_tune(settings_for(tmp_path, out=str(tmp_path / "parts"), steps=2, **keys))
    fine_tune(settings_for(tmp_path, out=str(tmp_path / "parts"), steps=4, resume=True, **keys))
    for name in ("model", "optimizer"):
        file = f"checkpoints/step_0000004/{name}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
