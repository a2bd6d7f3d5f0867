"""Published results taken as run on another machine: the same results, times and choices, and no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.artifacts import write_json
from scripts import reproduce
from scripts.reproduction.book import SETTLED, TIMING
from scripts.reproduction.cells import CONTROL, FULL, Cell, Circumstances, all_cells
from scripts.reproduction.claims import Claims
from scripts.reproduction.report import read_results
from scripts.reproduction.restoring import restore
from scripts.reproduction.running import RESULT, Planned, Runner
from scripts.reproduction.working import done

AROUND = Circumstances(
    {"dit": "builtin:dit_fmnist", "sit": "builtin:sit_fmnist"}, "fashion-mnist-subset", FULL, {}
)


def test_what_is_published_comes_back_once(tmp_path: Path, repository: Path) -> None:
    results = read_results(repository / "docs" / "results.json")
    written, held = restore(results, tmp_path)
    assert len(written) == len(results["cells"])
    assert held == []
    for cell in results["cells"]:
        folder = tmp_path / "cells" / f"{cell['name']}-{cell['key'][:10]}"
        left = json.loads((folder / RESULT).read_text())
        if (folder / TIMING).exists():
            left["timing"] = json.loads((folder / TIMING).read_text())
            # Of both: the ratio to the control, and that times the control's seconds.
            left |= {name: cell[name] for name in ("time_ratio", "seconds_per_image")}
        assert left == cell
    settled = json.loads((tmp_path / SETTLED).read_text())
    assert list(settled.values()) == [each["settled"] for each in results["remedies"]]
    # What the folder has stays as it is.
    (folder / RESULT).write_text("{}")
    written, held = restore(results, tmp_path)
    assert written == []
    assert len(held) == len(results["cells"])
    assert (folder / RESULT).read_text() == "{}"


def test_a_restored_cell_is_trained_once_more_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, control = Cell("dit", "dynamic", 0.7, 0), Cell("dit", CONTROL, 1.0, 0)
    runner = Runner(tmp_path, AROUND, all_cells(), None, lambda text: None, chooses=False)
    published = [
        {"name": each.name, "key": runner.plan(each).key, "fd": 3.0, "held_out_loss": 0.03}
        for each in (cell, control)
    ]
    restore({"cells": published, "remedies": []}, tmp_path)
    assert done(runner, cell) is not None
    assert reproduce._pending(runner, cell) is None
    assert f"no model of {cell.name} and {control.name} is here" in capsys.readouterr().out

    trained = []

    def stage(planned: Planned, name: str, on_process: object) -> None:
        trained.append((planned.cell.name, name))
        manifest = {"results": {"completed": name == "finetune", "held_out_loss": 0.031}}
        folder = planned.folder / {"convert": "converted", "finetune": "trained"}[name]
        (folder / "checkpoints" / "step-1").mkdir(parents=True)
        write_json(folder / "manifest.json", manifest)

    monkeypatch.setattr(runner, "_stage", stage)
    later = Cell("dit", "dynamic", 0.7, 1)
    assert reproduce._train_again(runner, Claims(tmp_path / "claims"), [cell, control, later]) == 0
    assert trained == [(each.name, name) for each in (cell, control) for name in ("convert", "finetune")]
    assert (
        f"{cell.name}: held-out loss 0.0310000, of the restored result 0.0300000" in capsys.readouterr().out
    )
    planned = runner.plan(cell)
    assert planned.has_model
    assert planned.result == published[0]
    assert not (planned.model / "checkpoints").exists()
    assert reproduce._pending(runner, cell) == (planned, runner.plan(control))
    # A second call has nothing to do.
    assert reproduce._train_again(runner, Claims(tmp_path / "claims"), [cell, control]) == 0
    assert len(trained) == 4
