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
    embedding, tokens = router(0.45)
    assert embedding.shape == (48,)
    assert tokens.shape == (3,)
    assert not embedding.any()
    assert not tokens.any()
    (embedding.sum() + tokens.sum()).backward()
    assert router.linear.weight.grad.abs().sum() > 0


def test_different_budgets_are_told_apart() -> None:
    router = fresh()
    torch.nn.init.normal_(router.linear.weight, generator=torch.Generator().manual_seed(0))
    told = torch.stack([router(budget)[0] for budget in router.inputs()])
    assert torch.cdist(told, told).fill_diagonal_(1).min() > 0.1


def test_a_budget_is_looked_up_in_what_was_realised() -> None:
    router = fresh()
    assert [router.input_for(budget) for budget in (0.3, 0.45, 1.0)] == pytest.approx([0.3, 0.45, 1.0])
    # Realised 0.05 above the input everywhere, and the last two the same.
    router.ratios = (torch.linspace(0.3, 1.0, KNOTS) + 0.05).clamp(max=0.95)
    assert router.input_for(0.55) == pytest.approx(0.5)
    assert router.input_for(0.3) == 0.3
    assert router.input_for(0.95) <= 1.0
    assert router.input_for(0.99) == 1.0


@pytest.mark.parametrize("budgets", [(0.5,), (0.5, 0.3), (0.0, 1.0), (0.3, 1.2)])
def test_what_is_no_range_is_refused(budgets: tuple[float, ...]) -> None:
    with pytest.raises(DyditError, match="no range of budgets"):
        check_budgets(budgets)


def test_a_budget_that_training_did_not_reach_is_refused() -> None:
    router = fresh()
    router.ratios = torch.linspace(0.55, 0.8, KNOTS)
    for budget in (0.54, 0.7, 0.81):
        router.check_realised(budget)
    for budget in (0.5, 0.9):
        with pytest.raises(DyditError, match=r"0\.550 to 0\.800"):
            router.check_realised(budget)
