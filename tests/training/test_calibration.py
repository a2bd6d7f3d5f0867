"""The correction at the end of a run, and the noise on the way to it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import load_model
from dydit_cli.objectives import held_out_ratio, measure, objective_for
from dydit_cli.objectives.draws import HeldOutDraws
from dydit_cli.training import prepare
from dydit_cli.training.calibration import LIMIT, TOLERANCE, calibrate, search
from dydit_cli.training.schedule import noise_scale_at
from tests.tiny import bits
from tests.training.runs import settings_for


@pytest.mark.parametrize("offset", [-1.3, -0.2, 0.4, 1.9])
def test_the_search_finds_the_shift(offset: float) -> None:
    found = search(lambda shift: 1 / (1 + math.exp(-(shift - offset))), 0.5)
    assert found.after == pytest.approx(0.5, abs=TOLERANCE)
    assert found.shift == pytest.approx(offset, abs=0.02)
    assert found.before == pytest.approx(1 / (1 + math.exp(offset)))


def test_the_search_changes_nothing_where_nothing_is_needed_or_enough() -> None:
    asked: list[float] = []

    def far_away(shift: float) -> float:
        asked.append(shift)
        return 0.9

    assert search(lambda shift: 0.5002, 0.5).shift == 0
    assert search(far_away, 0.5).shift == 0
    assert asked == [0.0, -LIMIT]


def test_the_search_takes_the_nearest_of_steps() -> None:
    """Few units and few samples leave a ratio that jumps."""
    found = search(lambda shift: 0.56 if shift > -0.3 else 0.46, 0.5)
    assert found.after == 0.46
    assert -0.3 - 0.02 < found.shift <= -0.3


def test_calibration_moves_biases_alone_and_the_ratio_to_its_target(tmp_path: Path) -> None:
    data = prepare(settings_for(tmp_path)).data
    model, objective = load_model(settings_for(tmp_path).model), objective_for("dit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = held_out_ratio(model, data.train, objective, images=250).ratio - 0.05
    found = calibrate(model, data.train, objective, target)
    assert found.shift < 0
    assert model.keep_bias == 0
    after = measure(model, HeldOutDraws(data.train, objective, 250)).ratio
    assert after == pytest.approx(found.after, abs=1e-6)
    assert abs(after - target) < abs(found.before - target) / 2
    moved = {
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(bits(tensor), bits(before[name]))
    }
    assert moved == {name for name in before if name.endswith(("_router.linear.bias", "_router.score.bias"))}


def test_noise_falls_after_the_ramp() -> None:
    def scales(gating: str, anneal: int | None) -> list[float]:
        return [noise_scale_at(gating, step, 10, 20, anneal) for step in (0, 29, 30, 40, 49, 50, 500)]

    assert scales("gumbel", None) == [1.0] * 7
    assert scales("annealed", None) == pytest.approx([1, 1, 1, 0.5, 0.05, 0, 0])
    assert scales("annealed", 0) == [1, 1, 0, 0, 0, 0, 0]
    assert scales("annealed", 40) == pytest.approx([1, 1, 1, 0.75, 0.525, 0.5, 0])


def test_the_complete_branch_may_run_every_few_steps(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, steps=6, complete_branch_steps=5, complete_branch_every=2)
    reports = list(prepare(settings).steps())
    assert ["complete" in report.terms for report in reports] == [True, False, True, False, True, False]


def test_both_ratios_are_reported_at_every_log_line_and_at_the_end(tmp_path: Path) -> None:
    started = prepare(settings_for(tmp_path, steps=6, log_every=2, calibrate=True))
    reports = list(started.steps())
    assert [report.realised_ratio is not None for report in reports] == [False, True] * 3
    assert all(0 < report.trained_ratio <= 1 for report in reports)
    result = started.finish()
    assert result.trained_ratio == pytest.approx(sum(report.trained_ratio for report in reports) / 6)
    assert result.uncalibrated_ratio is not None
    assert abs(result.ratio - 0.6) <= abs(result.uncalibrated_ratio - 0.6) + 0.02
