"""Training for a range of ratios: a model with a budget as an input, the budget of a step, and what is realised at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dydit_cli.data.source import Source
from dydit_cli.dynamic.budget import check_budgets
from dydit_cli.errors import DyditError
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.objectives import HeldOutDraws, Objective, measure
from dydit_cli.randomness import uniform
from dydit_cli.training.calibration import IMAGES


def budget_at(budgets: Sequence[float], seed: int, step: int) -> float:
    """The budget of the (0-based) ``step``: even between the least and the largest, the same for the whole batch."""
    low, high = budgets
    return low + (high - low) * float(uniform(seed, (), "budget", step))


def with_budgets(model: DynamicModel, budgets: Sequence[float], default: float) -> DynamicTransformer:
    """The same weights with a budget as an input of the routers; one that has the range already is returned as it is.

    Args:
        model: For training.
        budgets: Least and largest.
        default: The ratio of the result where nobody names one.

    Raises:
        DyditError: For a family without budgets, or a default outside the range.
    """
    low, high = check_budgets(budgets)
    if not isinstance(model, DynamicTransformer):
        raise DyditError(
            f"A {family_of(model).title} has no budgets.",
            why="Routers with a budget are written for blocks of DiT's form (DiT, SiT, class-conditional Latte).",
            fix="Leave budgets out and give a target_ratio.",
        )
    if not low <= default <= high:
        raise DyditError(
            f"The target ratio {default:g} is outside the budgets {low:g} to {high:g}.",
            why="It is the budget of the finished model where nobody names another.",
            fix="Set target_ratio to one of the budgets, or widen them.",
        )
    if model.config["budgets"] is not None and tuple(model.config["budgets"]) == (low, high):
        model.register_to_config(default_budget=default)
        model.set_budget(default)
        return model
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    extended = type(model)(**(config | {"budgets": [low, high], "default_budget": default}))
    router = extended.budget_router
    if router is None:
        raise TypeError("a model with budgets has a router for them")
    router.reset_parameters()
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith("budget_router.")
    }
    extended.load_state_dict(kept, strict=False)
    return extended.to(model.device).train()


@torch.no_grad()
def calibrate_budgets(model: DynamicTransformer, source: Source, objective: Objective) -> None:
    """Measure what ``model`` realises at its inputs, on samples of ``source``, so that budgets are looked up there."""
    router = model.budget_router
    if router is None:
        raise TypeError("a model with budgets has a router for them")
    router.ratios = torch.linspace(router.low, router.high, len(router.ratios), device=router.ratios.device)
    draws, asked, found = HeldOutDraws(source, objective, IMAGES), model.budget, []
    for value in router.inputs():
        found.append(measure(model.set_budget(value), draws).ratio)
    model.set_budget(asked if asked is not None else router.high)
    # A budget must have one place even where two inputs give nearly the same. Last, because what is asked for may be out of reach.
    router.ratios = torch.tensor(found, device=router.ratios.device).cummax(dim=0).values
