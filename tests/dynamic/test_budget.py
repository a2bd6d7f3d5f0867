"""The budget as an input of the routers."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.dynamic.budget import KNOTS, BudgetRouter, check_budgets
from dydit_cli.errors import DyditError


def fresh() -> BudgetRouter:
    router = BudgetRouter(0.3, 1.0, 48, 3)
    router.reset_parameters()
    return router


def test_it_says_nothing_at_the_start_and_has_a_gradient() -> None:
    router = fresh()
    told = router(0.45)
    assert told.embedding.shape == (48,)
    assert told.tokens.shape == (3,)
    assert told.shift.shape == ()
    assert not any(part.any() for part in told)
    sum(part.sum() for part in told).backward()
    assert (router.linear.weight.grad.abs().sum(dim=1) > 0).all()


def test_different_budgets_are_told_apart() -> None:
    router = fresh()
    torch.nn.init.normal_(router.linear.weight, generator=torch.Generator().manual_seed(0))
    told = torch.stack([router(budget).embedding for budget in router.knots()])
    assert torch.cdist(told, told).fill_diagonal_(1).min() > 0.1


def test_corrections_hold_at_their_budgets_and_change_evenly_between_them() -> None:
    router = fresh()
    knots = router.knots()
    assert (knots[0], knots[-1], len(knots)) == (0.3, 1.0, len(KNOTS))
    router.shifts = torch.linspace(-3, 4, len(KNOTS)) ** 2
    for place, budget in enumerate(knots):
        assert router(budget).shift.item() == pytest.approx(router.shifts[place].item(), abs=1e-4)
    middle = (knots[4] + knots[5]) / 2
    assert router(middle).shift.item() == pytest.approx(float(router.shifts[4:6].mean()), abs=1e-4)
    router.forget_corrections()
    assert router(middle).shift.item() == 0


@pytest.mark.parametrize("budgets", [(0.5,), (0.5, 0.3), (0.0, 1.0), (0.3, 1.2)])
def test_what_is_no_range_is_refused(budgets: tuple[float, ...]) -> None:
    with pytest.raises(DyditError, match="no range of budgets"):
        check_budgets(budgets)


def test_a_budget_that_no_correction_reached_is_refused() -> None:
    router = fresh()
    router.check_realised(0.5)  # nobody has measured it
    router.ratios = torch.tensor(router.knots()).clamp(0.45, 0.8)
    for budget in (0.47, 0.7, 0.8):
        router.check_realised(budget)
    for budget in (0.4, 0.9):
        with pytest.raises(DyditError, match=r"serves 0\.450 to 0\.800"):
            router.check_realised(budget)
