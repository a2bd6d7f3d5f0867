"""Training for a range of ratios, and the control of a single one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import load_model
from dydit_cli.errors import DyditError
from dydit_cli.objectives import held_out_ratio, objective_for
from dydit_cli.training import checkpoint, prepare
from dydit_cli.training.budgets import Found, budget_at, nearest, with_budgets
from dydit_cli.training.feedback import LARGEST, RatioFeedback
from tests.tiny import tiny_model
from tests.training.runs import metrics_of, settings_for
from tests.training.test_finetuning import run, tensors_of


def test_the_budget_of_a_step_is_even_and_a_function_of_seed_and_step() -> None:
    drawn = [budget_at((0.3, 0.9), 0, step) for step in range(2000)]
    assert drawn == [budget_at((0.3, 0.9), 0, step) for step in range(2000)]
    assert 0.3 <= min(drawn) < 0.31
    assert 0.89 < max(drawn) <= 0.9
    assert sum(drawn) / len(drawn) == pytest.approx(0.6, abs=0.015)
    assert drawn != [budget_at((0.3, 0.9), 1, step) for step in range(2000)]


def test_a_run_with_budgets_trains_for_each_and_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dydit_cli.training.budgets.TIMESTEPS", 10)
    budgets = {
        "budgets": (0.4, 1.0),
        "router_learning_rate": 0.02,
        "steps": 20,
        "ratio_weight": 20.0,
        "calibrate": True,
    }
    settings = settings_for(tmp_path, fresh_routers=False, evaluate_every=0, checkpoint_every=0, **budgets)
    run(settings)
    targets = [line["target"] for line in metrics_of(tmp_path / "t")]
    assert len(set(targets[5:])) > 10
    model, data = (
        load_model(tmp_path / "t"),
        prepare(settings.model_copy(update={"out": tmp_path / "o"})).data,
    )
    assert model.budget == 0.6
    assert model.budget_router.linear.weight.abs().sum() > 0
    knots = torch.tensor(model.budget_router.knots())
    # So small a model has few units, and its ratio moves in jumps.
    assert (model.budget_router.ratios - knots).abs().max() < 0.05
    # At a budget that was measured, and between two.
    for wanted in (0.4, 0.615, 1.0):
        reached = held_out_ratio(model.set_budget(wanted), data.held_out, objective_for("dit")).ratio
        assert reached == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(
    ("target", "shift", "evaluations"), [(0.5, 0.0, 1), (0.31, -1.6, 14), (0.99, 9.2, 14), (1.0, 13.0, 14)]
)
def test_the_search_finds_a_shift_on_either_side(target: float, shift: float, evaluations: int) -> None:
    asked = []

    def ratio_at(amount: float) -> float:
        asked.append(amount)
        return round(1 / (1 + math.exp(-amount / 2)), 3)

    found = nearest(ratio_at, target, 0.0)
    assert found.ratio == pytest.approx(target, abs=2e-3)
    assert found.shift == pytest.approx(shift, abs=3.0)
    assert len(asked) <= evaluations


def test_the_search_takes_the_nearest_where_the_ratio_jumps() -> None:
    assert nearest(lambda shift: 0.2 if shift < 3 else 0.55, 0.5, 0.0).ratio == 0.55
    assert nearest(lambda shift: 0.4, 0.5, 0.0) == Found(0.0, 0.4)


def test_a_run_with_budgets_resumes_bit_for_bit(tmp_path: Path) -> None:
    budgets = {"budgets": (0.4, 1.0), "checkpoint_every": 3}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    run(settings_for(straight, **budgets))
    run(settings_for(stopped, **budgets), stop_after=3)
    run(settings_for(stopped, resume=True, **budgets))
    expected, found = tensors_of(straight / "t"), tensors_of(stopped / "t")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_budgets_and_target_must_fit_together() -> None:
    with pytest.raises(DyditError, match="outside the budgets"):
        with_budgets(tiny_model("dit"), (0.3, 0.6), 0.8)
    with pytest.raises(DyditError, match="no budgets"):
        with_budgets(tiny_model("flux"), (0.3, 1.0), 0.5)
    with pytest.raises(ValueError, match="between the budgets"):
        settings_for(Path(), budgets=(0.7, 1.0))


def test_feedback_moves_the_target_against_what_is_missed_and_stays_small() -> None:
    control = RatioFeedback(0.98)
    for _ in range(5):
        control.see(0.54, 0.5)
    assert control.offset == pytest.approx(5 * 0.2 * 0.04)
    for _ in range(200):
        control.see(0.9, 0.5)
    assert control.offset == LARGEST
    for _ in range(200):
        control.see(0.4, 0.5)
    assert control.offset == -LARGEST


def test_feedback_removes_a_constant_difference_without_swinging() -> None:
    """The moving average follows what training is told with a lag, and ends 0.04 above it."""
    control, average, decay = RatioFeedback(0.98), 0.56, 0.98
    seen = []
    for step in range(1000):
        trained = 0.5 - control.offset
        average = decay * average + (1 - decay) * (trained + 0.04)
        if (step + 1) % 10 == 0:
            control.see(average, 0.5)
            seen.append(average)
    assert seen[-1] == pytest.approx(0.5, abs=1e-3)
    assert min(seen) > 0.48


def test_feedback_is_kept_in_checkpoints(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, steps=20, checkpoint_every=10, log_every=10, feedback=True)
    run(settings)
    offsets = [found.facts["ratio_offset"] for found in checkpoint.checkpoints(tmp_path / "t")]
    assert offsets[0] != 0
    assert offsets[0] != offsets[-1]
    longer = prepare(
        settings_for(tmp_path, steps=30, checkpoint_every=10, log_every=10, feedback=True, resume=True)
    )
    assert longer._measuring.feedback.offset == offsets[-1]
