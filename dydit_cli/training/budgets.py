"""Training for a range of ratios: a model with a budget as an input, the budget of a step, and what is realised at the end."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dydit_cli.data.source import Source
from dydit_cli.dynamic.budget import check_budgets
from dydit_cli.errors import DyditError
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.objectives import HeldOutDraws, Objective, measure, objective_of
from dydit_cli.randomness import uniform
from dydit_cli.training.calibration import IMAGES, Measure

LEVELS = 50
GOLDEN = (math.sqrt(5) - 1) / 2
BEYOND = 0.1
"""By how much of the range, on either side, more than it is covered."""

TIMESTEPS = 25
TOLERANCE = 2e-3
FIRST_STRIDE, LAST_STRIDE = 0.5, 32.0
"""Of the search for a correction, in logits."""
REFINEMENTS = 6


def budget_at(budgets: Sequence[float], seed: int, step: int) -> float:
    """The budget of the (0-based) ``step``, the same for the whole batch.

    Multiples of the golden ratio, modulo 1, from a random start: whichever steps are looked at, they are spread evenly over the
    range. A little more than the range is covered and cut off, so that its ends, which bound what a user can ask for, are trained
    as such, at one step in twelve each.
    """
    low, high = budgets
    place = (float(uniform(seed, (), "budget")) + step * GOLDEN) % 1.0
    return min(high, max(low, low + (high - low) * ((1 + 2 * BEYOND) * place - BEYOND)))


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
    router = model.budget_router
    if router is not None and (router.low, router.high) == (low, high):
        model.register_to_config(default_budget=default)
        # Corrections stay until they are measured again; what they led to holds no longer once weights train.
        router.ratios.zero_()
        model.set_budget(default)
        return model
    # The configuration also holds what the class that all families share takes, and this one may not.
    taken = inspect.signature(type(model)).parameters
    config = {name: value for name, value in model.config.items() if name in taken}
    extended = type(model)(**(config | {"budgets": [low, high], "default_budget": default}))
    router = extended.budget_router
    if router is None:
        raise TypeError("a model with budgets has a router for them")
    router.reset_parameters()
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith("budget_router.")
    }
    extended.load_state_dict(kept, strict=False)
    with torch.no_grad():
        router.set_gain(extended.embed_time(objective_of(extended).grid(LEVELS)))
    return extended.to(model.device).train()


@dataclass(frozen=True)
class Found:
    """A shift of all logits, and the ratio that is realised with it."""

    shift: float
    ratio: float


@torch.no_grad()
def calibrate_budgets(
    model: DynamicTransformer, source: Source, objective: Objective, measuring: Measure = measure
) -> None:
    """Find, at evenly spaced budgets, the shift of all logits at which ``model`` realises the budget on samples of ``source``."""
    router = model.budget_router
    if router is None:
        raise TypeError("a model with budgets has a router for them")
    router.forget_corrections()
    draws, asked, start = HeldOutDraws(source, objective, IMAGES, TIMESTEPS), model.budget, 0.0
    # Neighbours need nearly the same shift.
    for place, budget in enumerate(router.knots()):
        model.set_budget(budget)

        def ratio_at(shift: float, place: int = place) -> float:
            router.shifts[place] = shift
            return measuring(model, draws).ratio

        found = nearest(ratio_at, budget, start)
        router.shifts[place], router.ratios[place] = found.shift, found.ratio
        start = found.shift
    model.set_budget(asked if asked is not None else router.high)


def nearest(ratio_at: Callable[[float], float], target: float, start: float) -> Found:
    """Find the shift at which the ratio is ``target``: in growing steps to its other side, then between the two.

    Args:
        ratio_at: The ratio at a shift; it grows with it, perhaps in jumps.
        target: What it should be.
        start: Where to begin.
    """
    tried: list[Found] = []

    def look(shift: float) -> Found:
        tried.append(Found(shift, ratio_at(shift)))
        return tried[-1]

    def met() -> bool:
        return abs(tried[-1].ratio - target) <= TOLERANCE

    near = look(start)
    up, stride = near.ratio < target, FIRST_STRIDE
    while not met() and stride <= LAST_STRIDE:
        far = look(near.shift + (stride if up else -stride))
        if met() or (far.ratio > target) == up:
            break
        near, stride = far, 2 * stride
    else:
        return best_of(tried, target)
    for _ in range(REFINEMENTS):
        if met():
            break
        # Where the line between the two meets the target; not too near to either, because ratios jump.
        share = min(0.9, max(0.1, (target - near.ratio) / (far.ratio - near.ratio)))
        middle = look(near.shift + share * (far.shift - near.shift))
        near, far = (middle, far) if (middle.ratio < target) == up else (near, middle)
    return best_of(tried, target)


def best_of(tried: Sequence[Found], target: float) -> Found:
    """The nearest; of several the smallest shift, because a ratio of few samples moves in jumps."""
    return min(tried, key=lambda found: (abs(found.ratio - target), abs(found.shift)))
