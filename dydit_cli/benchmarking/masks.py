"""Masks for a model that was never trained: chosen by count or by ratio, and imposed by setting the routers themselves.

Routers that decide so are asked as any trained ones are: plans, policies for weights and compiled graphs see nothing special,
and their cost is part of what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.errors import DyditError
from dydit_cli.execution import DenseExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import attention_macs, mlp_macs
from dydit_cli.randomness import generator

SURE = 10.0
"""Size of the logits of imposed widths."""

SPREAD = 1.0
"""Standard deviation that the logits of imposed tokens get: far from both ends of any type of numbers."""


@dataclass(frozen=True)
class Case:
    """What is on in every block: so many heads, so many groups, and a share of the tokens."""

    heads: int
    groups: int
    tokens: float

    def words(self, geometry: Geometry) -> str:
        """For people."""
        if (self.heads, self.groups, self.tokens) == (geometry.num_heads, geometry.num_groups, 1.0):
            return "everything on"
        return (
            f"{self.heads}/{geometry.num_heads} heads, {self.groups}/{geometry.num_groups} groups, "
            f"{self.tokens:.0%} of tokens"
        )


def case_of(geometry: Geometry, heads: int | None, groups: int | None, tokens: float) -> Case:
    """So many units; None is all of them.

    Raises:
        DyditError: If there are not so many.
    """
    least = int(geometry.always_on)
    for name, count, all_units in (
        ("heads", heads, geometry.num_heads),
        ("groups", groups, geometry.num_groups),
    ):
        if count is not None and not least <= count <= all_units:
            raise DyditError(
                f"{count} {name} cannot be on.",
                why=f"A block of this size has {all_units} of them, of which at least {least} is always on.",
                fix=f"Pass --{name} with a number from {least} to {all_units}, or 'all'.",
            )
    return Case(
        geometry.num_heads if heads is None else heads,
        geometry.num_groups if groups is None else groups,
        tokens,
    )


def case_for_ratio(geometry: Geometry, ratio: float) -> Case:
    """Heads, groups and tokens whose attention and MLP MACs are ``ratio`` of all (ours: spread evenly over the three).

    The share of heads is the ratio itself, rounded to a whole number; of what is left for the MLP, groups take the square root,
    rounded up, and tokens the rest, exactly.

    Raises:
        DyditError: If even the least that can be on is more.
    """
    attention, mlp = attention_macs(geometry), mlp_macs(geometry)
    total = attention + mlp
    least = int(geometry.always_on)
    heads = max(least, round(ratio * geometry.num_heads))
    while heads > least and heads / geometry.num_heads * attention > ratio * total:
        heads -= 1
    left = (ratio * total - heads / geometry.num_heads * attention) / mlp
    if left < 0:
        floor = least / geometry.num_heads * attention / total
        raise DyditError(
            f"A ratio of {ratio:g} cannot be reached.",
            why=f"One head is always on, and it alone is {floor:.3f} of the work.",
            fix=f"Pass --ratio {floor + 0.005:.2f}, or more.",
        )
    left = min(left, 1.0)
    groups = max(least, min(geometry.num_groups, -int(-(left**0.5) * geometry.num_groups // 1)))
    return Case(heads, groups, min(1.0, left * geometry.num_groups / groups) if groups else 0.0)


@torch.no_grad()
def impose(
    model: DynamicModel,
    case: Case,
    masks: str,
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    seed: int,
) -> None:
    """Set a model's routers so that ``case`` is on.

    Tokens stay a decision on each token: the biases are set to where the wanted share of those of ``inputs`` is kept; other
    inputs keep a little more or less.

    Args:
        model: Changed in place.
        case: What is to be on.
        masks: ``prefix``: the most important units, at any timestep; ``scattered``: unit 0, and others at random, the same at any
            timestep; ``changing``: unit 0, and others at random, anew at each of the timesteps of ``inputs``.
        inputs: States, timesteps and labels of one or several forwards.
        seed: Of what is scattered.

    Raises:
        DyditError: If the type of numbers is too coarse for masks that change.
    """
    times = torch.stack([timestep.flatten()[0] for _, timestep, _ in inputs])
    # On the CPU: not every device knows fp64.
    embeddings = model.t_embedder(model.native_timestep(times)).cpu().double()
    for index, block in enumerate(model.dynamic_blocks):
        for name, router, count in (
            ("heads", block.head_router, case.heads),
            ("groups", block.channel_router, case.groups),
        ):
            steps = range(len(inputs)) if masks == "changing" else [0]
            wanted = torch.stack(
                [
                    chosen(router.units, count, masks != "prefix", generator(seed, "mask", name, index, step))
                    for step in steps
                ]
            )
            # Always-on units come first and have no row.
            logits = SURE * (2 * wanted[:, router.units - len(router.linear.bias) :] - 1)
            router.linear.weight.zero_()
            router.linear.bias.copy_(logits[0])
            if masks == "changing":
                # Fewer timesteps than channels: there are weights that give any logits at them.
                solved = torch.linalg.lstsq(embeddings, logits.to(embeddings)).solution
                router.linear.weight.copy_(solved.t())
                router.linear.bias.zero_()
                if not torch.equal(
                    router(embeddings.to(model.device, model.dtype)) > 0, logits.to(model.device) > 0
                ):
                    raise DyditError(
                        f"Masks that change from step to step cannot be imposed in {model.dtype}.",
                        why="The routers' weights would have to be finer than its numbers are.",
                        fix="Pass --masks scattered, or --dtype float32.",
                    )
    together = [torch.cat(parts) for parts in zip(*inputs, strict=True)]
    model.denoise(
        together[0],
        together[1],
        together[2],
        executor=DenseExecutor(),
        gating=_TokenShare(model, case.tokens),
    )


def chosen(units: int, on: int, scattered: bool, draws: torch.Generator) -> Tensor:
    """A (units,) mask with ``on`` ones: a prefix, or unit 0 and others at random."""
    order = torch.arange(units)
    if scattered:
        order[1:] = 1 + torch.randperm(units - 1, generator=draws)
    return torch.zeros(units).index_fill(0, order[:on], 1.0)


class _TokenShare:
    """A gating that moves each token router to where a share of the tokens is kept, block by block."""

    def __init__(self, model: DynamicModel, share: float) -> None:
        self._model = model
        self._share = share

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return (logits > 0).float()

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return (logits > 0).float()

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return (logits > 0).float()

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        score = self._model.dynamic_blocks[block].token_router.score
        raw = logits - score.bias.float()
        ordered, kept = raw.flatten().sort(descending=True).values, round(self._share * raw.numel())
        if kept in (0, raw.numel()):
            score.weight.zero_()
            score.bias.fill_(SURE if kept else -SURE)
            return torch.full_like(logits, float(kept > 0))
        scale = SPREAD / float(ordered.std().clamp(min=1e-12))
        threshold = float((ordered[kept - 1] + ordered[kept]) / 2)
        score.weight.mul_(scale)
        score.bias.fill_(-threshold * scale)
        # As the rounded router decides, so that later blocks see what they will see.
        return (raw * scale + score.bias.float() > 0).float()
