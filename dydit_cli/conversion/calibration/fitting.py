"""Width routers whose decisions follow a table: a ridge regression from timestep embeddings to logits of about 2 and -2.

At the paper's start every logit is 15: the model is complete, and training spends its first steps on leaving that plateau. At 2 a unit
is on with a probability of 0.88 under the noise of training, and a gradient reaches it at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.conversion.calibration.units import Place, Units
from dydit_cli.dynamic.routers import UNIT_GAP_BIAS, OrderedWidthRouter
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives import Objective

MARGIN = 2.0
"""Of a logit, on either side."""
LEVELS = 32
"""Timesteps of a range that the regression sees."""
RIDGE = 1e-3
"""Of the regression, as a share of the largest singular value of the embeddings: components weaker than that are left alone. Beyond
it weights grow without telling timesteps better apart."""
TURNS = 10
"""More of them win few decisions, for logits that are far from 2."""
EDGE = 0.25
"""By which the common part of an ordered router keeps off the next count."""
TINY = 1e-30
LIMIT = 1.5
"""Of the number that is added to all logits at last. The table's own margin is 2."""
TOLERANCE = 1e-3
ATTEMPTS = 12


@dataclass(frozen=True)
class Fit:
    """What the routers do after a fit.

    Attributes:
        agreement: Share of decisions, over units with a router row and timesteps, that are the table's.
        shift: Added to all logits, so that the ratio is met.
        ratio: Of MACs, every token kept, mean over the timesteps.
    """

    agreement: float
    shift: float
    ratio: float


@dataclass(frozen=True)
class Regression:
    """Ridge regression on embeddings, to values between bounds.

    Least squares to 2 and -2 would pull down logits that are larger than they need be, and give up decisions elsewhere for it. So
    values are projected between their bounds and fitted again, in turns.

    Attributes:
        centre: (C,) mean of the embeddings, which is the bias's matter.
        left: (T, K), strength: (K,), right: (K, C): the embeddings without it.
    """

    centre: Tensor
    left: Tensor
    strength: Tensor
    right: Tensor

    @classmethod
    def on(cls, inputs: Tensor) -> Regression:
        """On (T, C) embeddings in fp64."""
        centre = inputs.mean(dim=0)
        return cls(centre, *torch.linalg.svd(inputs - centre, full_matrices=False))

    def fit(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (rows, C) and bias (rows,) of a layer whose outputs at the T embeddings lie between two (T, rows), where it can."""
        squares = self.strength**2
        damping = squares / (squares + (RIDGE * self.strength[0]) ** 2)
        wanted = torch.zeros_like(lower).clamp(lower, upper)
        for _ in range(TURNS):
            mean = wanted.mean(dim=0)
            fitted = mean + (self.left * damping) @ (self.left.T @ (wanted - mean))
            wanted = fitted.clamp(lower, upper)
        mean = wanted.mean(dim=0)
        weight = (wanted - mean).T @ (self.left * (damping / self.strength.clamp(min=TINY))) @ self.right
        return weight, mean - weight @ self.centre


@torch.no_grad()
def fit_routers(model: DynamicModel, units: Units, table: Tensor, objective: Objective, target: float) -> Fit:
    """Set the width routers of a model by a table; token routers stay as they are.

    Args:
        model: Changed in place.
        units: Its units.
        table: (R, U) bool.
        objective: Of its family: gives the timesteps.
        target: The ratio that the decisions are to have.
    """
    times = objective.grid(len(table) * LEVELS).to(model.device)
    wanted = table.repeat_interleave(LEVELS, dim=0)
    inputs = model.router_input(model.embed_time(times)).cpu().double()
    regression = Regression.on(inputs)
    for place in units.places:
        _write(place, *regression.fit(*_bounds(place, wanted[:, place.columns])))
    shift = _meet(model, units, times, target)
    decided, ratio = _decided(model, units, times)
    free = ~units.always_on()
    agreement = float((decided == wanted)[:, free].double().mean())
    return Fit(agreement, shift, ratio)


def _bounds(place: Place, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(T, units) bool -> between what the router's linear layer is to be, two (T, rows); of an ordered one the common part, (T, 1)."""
    routed = wanted[:, int(place.router.always_on) :]
    never = torch.full(routed.shape, math.inf, dtype=torch.float64)
    if not isinstance(place.router, OrderedWidthRouter):
        return (
            torch.where(routed, MARGIN, -never),
            torch.where(routed, never, -MARGIN),
        )
    # Units lie a logit apart, so that between n units on and n + 1 the common part is between n and n + 1.
    count, units = routed.sum(dim=1, keepdim=True).double(), routed.shape[1]
    lower = torch.where(count == 0, -never[:, :1], count + EDGE)
    upper = torch.where(count == units, never[:, :1], count + 1 - EDGE)
    return (
        torch.where(count == units, units + MARGIN, lower),
        torch.where(count == 0, 1 - MARGIN, upper),
    )


def _write(place: Place, weight: Tensor, bias: Tensor) -> None:
    layer = place.router.linear
    if isinstance(place.router, OrderedWidthRouter):
        layer.weight.zero_()
        layer.bias.fill_(UNIT_GAP_BIAS)
        layer.weight[0].copy_(weight[0])
        layer.bias[0].copy_(bias[0])
    else:
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def _decided(model: DynamicModel, units: Units, times: Tensor) -> tuple[Tensor, float]:
    """The decisions at timesteps as a bool table on the CPU, and their mean ratio."""
    routing = model.routing(times).cpu()
    return units.table(routing), float(executed_ratio(routing, model.geometry).mean())


def _meet(model: DynamicModel, units: Units, times: Tensor, target: float) -> float:
    """Add one number to all width logits, so that the ratio at ``times`` is the target; 0 where none within reach helps."""

    def ratio() -> float:
        return _decided(model, units, times)[1]

    def move(amount: float) -> None:
        for place in units.places:
            place.router.shift(amount)

    before = ratio()
    tried = {0.0: before}
    near, far = 0.0, LIMIT if before < target else -LIMIT
    for _ in range(ATTEMPTS):
        if min(abs(value - target) for value in tried.values()) <= TOLERANCE:
            break
        amount = (near + far) / 2
        move(amount)
        tried[amount] = ratio()
        move(-amount)
        if (tried[amount] - target) * (before - target) > 0:
            near = amount
        else:
            far = amount
    best = min(tried, key=lambda amount: (abs(tried[amount] - target), abs(amount)))
    move(best)
    return best
