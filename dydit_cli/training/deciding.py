"""Who decides while a run trains: all routers learn, or one of the baselines that show what each of them is worth.

Every entry is a start of the routers, and says which of them learn from there. What a baseline decides therefore stands in the
weights: its artifact is an ordinary dynamic model, which samples, profiles and exports like any other.

Source of the comparisons: the ablation of DyDiT (arXiv 2410.03456): timestep-wise width alone, spatial-wise tokens alone, and random
decisions. How random decisions are drawn is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dydit_cli.data.source import Source
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routers import OrderedWidthRouter, TokenRouter, WidthRouter
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import executed_ratio, ratio_floor
from dydit_cli.objectives import HeldOutDraws, Objective
from dydit_cli.randomness import normal

SURE = 100.0
"""A logit that neither the noise of training (at most 16) nor a calibration (at most 2) takes below zero."""
SPREAD = 5.0
"""Standard deviation of the logits of random routers: wide enough that rounding flips none, narrow enough to be calibrated."""
IMAGES = 200
"""Training samples on which random routers are set."""


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        model: Changed in place.
        source: Training samples.
        objective: Of the model's family.
        target_ratio: Of the run.
        seed: Of the run.
    """

    model: DynamicModel
    source: Source
    objective: Objective
    target_ratio: float
    seed: int


@dataclass(frozen=True)
class Deciding:
    """One way to decide.

    Attributes:
        name: As given to ``routers``.
        text: For people.
        begin: Sets the routers, and freezes those that do not learn.
        width: Whether heads and channel groups are decided; else all of them stay on.
        tokens: Whether tokens are decided; else all of them are kept.
    """

    name: str
    text: str
    begin: Callable[[Beginning], None]
    width: bool = True
    tokens: bool = True


def routers_of(model: DynamicModel) -> Iterator[tuple[str, Any, bool]]:
    """Every router of a model by name, with whether it decides widths."""
    for name, module in model.named_modules():
        if name.endswith("_router") and name != "budget_router":
            yield name, module, isinstance(module, WidthRouter)


@torch.no_grad()
def keep_on(router: Any) -> None:
    """Make a router (a module with `shift`) say yes whatever it reads, and learn nothing."""
    for parameter in router.parameters():
        parameter.zero_()
        parameter.requires_grad_(False)
    router.shift(SURE)


def all_learn(beginning: Beginning) -> None:
    """The method: nothing is changed."""


def width_alone(beginning: Beginning) -> None:
    """TDW alone: the token routers keep every token."""
    for _, router, of_width in routers_of(beginning.model):
        if not of_width:
            keep_on(router)


def tokens_alone(beginning: Beginning) -> None:
    """SDT alone: every head and channel group stays on."""
    for _, router, of_width in routers_of(beginning.model):
        if of_width:
            keep_on(router)


@torch.no_grad()
def at_random(beginning: Beginning) -> None:
    """Random weights that learn nothing, biases at which each router keeps the same share.

    A width router is a random projection of the timestep embedding, so that each unit but the always-on one is on for the same
    share of the timesteps, which ones is chance; a token router is a random function of the token. All shares are equal, and such that
    attention and MLP together execute the target.

    Raises:
        DyditError: For routers of another form.
    """
    model = beginning.model
    for name, router, _ in routers_of(model):
        if isinstance(router, OrderedWidthRouter) or not isinstance(router, (WidthRouter, TokenRouter)):
            raise DyditError(
                "Random routers are written for free width in blocks of DiT's form.",
                why=f"'{name}' is a {type(router).__name__}.",
                fix="Convert a DiT, SiT or class-conditional Latte with width free.",
            )
        for part, parameter in router.named_parameters():
            drawn = normal(beginning.seed, tuple(parameter.shape), "random_routers", name, part)
            parameter.copy_(drawn if part.endswith("weight") else torch.zeros_like(drawn))
            parameter.requires_grad_(False)
    share = share_for(model.geometry, beginning.target_ratio)
    draws = HeldOutDraws(beginning.source, beginning.objective, IMAGES, batch_size=IMAGES)
    parts = list(draws.batches(model.device))
    clean, noise = (torch.cat([getattr(part, name) for part in parts]) for name in ("clean", "noise"))
    times = torch.cat([part.t for part in parts])
    # Models with these routers are told labels.
    labels = torch.cat([part.condition for part in parts if isinstance(part.condition, Tensor)])
    noisy = beginning.objective.noised(clean, noise, times)
    model.denoise(noisy, times, labels, executor=model.make_executor("dense"), gating=_Setting(model, share))


class _Setting:
    """A gating that sets the routers as it meets them, and then decides as they do."""

    def __init__(self, model: DynamicModel, share: float) -> None:
        self._blocks, self._share = model.dynamic_blocks, share

    def _width(self, router: WidthRouter, logits: Tensor) -> Tensor:
        # The always-on unit counts among those that are kept.
        routed = logits.shape[1]
        share = (self._share * router.units - (router.units - routed)) / max(1, routed)
        shift, scale = _standardised(logits, min(1.0, max(0.0, share)))
        router.linear.weight.mul_(scale[:, None])
        router.linear.bias.sub_(shift).mul_(scale)
        return ((logits - shift) * scale > 0).float()

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._width(self._blocks[block].head_router, logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._width(self._blocks[block].channel_router, logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`; blocks of DiT's form have none."""
        raise TypeError("blocks with a text stream have no random routers")

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        shift, scale = _standardised(logits.reshape(-1, 1), self._share)
        score = self._blocks[block].token_router.score
        score.weight.mul_(scale[:, None])
        score.bias.sub_(shift).mul_(scale)
        return ((logits - shift) * scale > 0).float()


def _standardised(logits: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of (S, U) logits, the shift below which all but ``share`` of each column lie, and the scale to the common spread, (U,)."""
    spread = logits.std(dim=0).clamp(min=1e-6)
    return logits.quantile(1 - share, dim=0), SPREAD / spread


def share_for(geometry: Geometry, ratio: float) -> float:
    """The share s of heads, groups and tokens at which attention * s + MLP * s^2 is ``ratio`` of both."""
    costs = [cost.complete for cost in geometry.block_costs()]
    attention = sum(float(cost.attention) for cost in costs)
    mlp = sum(float(cost.mlp) for cost in costs)
    wanted = ratio * (attention + mlp)
    return (math.sqrt(attention**2 + 4 * mlp * wanted) - attention) / (2 * mlp)


DECIDING: dict[str, Deciding] = {
    each.name: each
    for each in (
        Deciding("learned", "all routers learn (the method)", all_learn),
        Deciding("width", "heads and channel groups alone are dynamic (TDW)", width_alone, tokens=False),
        Deciding("tokens", "tokens alone are dynamic (SDT)", tokens_alone, width=False),
        Deciding("random", "random decisions at the target ratio; nothing is learned about them", at_random),
    )
}
"""By name; a plug-in adds its own."""


def deciding_named(name: str) -> Deciding:
    """Return the way to decide called ``name``.

    Raises:
        DyditError: If there is none.
    """
    if name in DECIDING:
        return DECIDING[name]
    raise DyditError(
        f"There is no way to decide called '{name}'.",
        why=f"Routers are one of {', '.join(DECIDING)}, or of a file given with --plugin.",
        fix=did_you_mean(name, DECIDING) or "Pass one of these.",
    )


def least_ratio(deciding: Deciding, geometry: Geometry) -> float:
    """The least ratio that training can reach where only some routers decide; see `ratio_floor`."""
    if deciding.width and deciding.tokens:
        return ratio_floor(geometry)
    units = [
        torch.arange(count)[None] < (least if decided else count)
        for count, least, decided in (
            (geometry.num_heads, int(geometry.always_on), deciding.width),
            (geometry.num_groups, int(geometry.always_on), deciding.width),
            (geometry.num_tokens, 0, deciding.tokens),
        )
    ]
    heads, groups, tokens = (mask.float() for mask in units)
    block = BlockRouting(heads, groups, tokens, groups if geometry.has_context else None)
    return float(executed_ratio(Routing((block,) * geometry.depth), geometry))
