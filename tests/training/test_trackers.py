"""Trackers beside the file of metrics: what they are given, that a resumed run goes on in the same place, and what they cannot break."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dydit_cli.errors import DyditError
from dydit_cli.training import prepare, trackers
from tests.training.runs import metrics_of, settings_for
from tests.training.test_finetuning import run


class StandInRun:
    """What ``wandb.init`` returns."""

    def __init__(self, init: dict[str, Any]) -> None:
        self.init = init
        self.id = init["id"] or "abc123"
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[StandInRun]:
    """A package called wandb; the runs that were started with it."""
    runs: list[StandInRun] = []
    module: Any = ModuleType("wandb")

    def init(**settings: Any) -> StandInRun:
        runs.append(StandInRun(settings))
        return runs[-1]

    module.init, module.Image = init, lambda path: f"picture {Path(path).name}"
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_weights_and_biases_sees_what_the_file_sees(tmp_path: Path, wandb: list[StandInRun]) -> None:
    settings = settings_for(tmp_path, trackers=("jsonl", "wandb"), log_every=2, sample_every=3)
    started = prepare(settings)

    def draw(model: object, step: int, path: Path) -> None:
        Image.new("RGB", (4, 4)).save(path)

    list(started.steps(on_sample=draw))
    (only,) = wandb
    assert only.init["config"]["batch_size"] == 8
    assert only.init["name"] == "t"
    assert only.finished
    lines = {line["step"]: line for line in metrics_of(tmp_path / "t")}
    numbers = [(step, values) for step, values in only.logged if "loss" in values]
    assert [step for step, _ in numbers] == [2, 4, 6]
    for step, values in numbers:
        assert values["loss"] == lines[step]["loss"]
        assert values["trained_ratio"] == lines[step]["trained_ratio"]
        assert None not in values.values()
    pictures = [(step, values["samples"]) for step, values in only.logged if "samples" in values]
    assert pictures == [(3, "picture step_0000003.png"), (6, "picture step_0000006.png")]


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path, wandb: list[StandInRun]) -> None:
    run(settings_for(tmp_path, trackers=("wandb",)), stop_after=3)
    assert json.loads((tmp_path / "t" / "trackers.json").read_text()) == {"wandb": {"id": "abc123"}}
    run(settings_for(tmp_path, trackers=("wandb",), resume=True))
    assert [(entry.init["id"], entry.init["resume"]) for entry in wandb] == [
        (None, None),
        ("abc123", "allow"),
    ]
    assert [step for entry in wandb for step, _ in entry.logged] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, wandb: list[StandInRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(self: StandInRun, values: dict[str, Any], step: int) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(StandInRun, "log", no_network)
    reports = list(prepare(settings_for(tmp_path, trackers=("wandb",), steps=3)).steps())
    assert [len(report.notes) for report in reports] == [1, 0, 0]
    assert "no route to host" in reports[0].notes[0]
    assert [line["step"] for line in metrics_of(tmp_path / "t")] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(DyditError, match="tracker wandb is not installed") as caught:
        prepare(settings_for(tmp_path, trackers=("jsonl", "wandb")))
    assert "pip install wandb" in caught.value.fix
    assert not (tmp_path / "t").exists()


def test_tensorboard_writes_its_curves(tmp_path: Path) -> None:
    accumulating = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(settings_for(tmp_path, trackers=("tensorboard",)), stop_after=3)
    run(settings_for(tmp_path, trackers=("tensorboard",), resume=True))
    events = accumulating.EventAccumulator(str(tmp_path / "t" / "tensorboard"))
    events.Reload()
    lines = metrics_of(tmp_path / "t")
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)
