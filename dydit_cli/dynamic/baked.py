"""Widths that were written down: for a known list of timesteps, which heads and channel groups run.

Width routers read the timestep alone. Where the timesteps of a schedule are known, their decisions are too, and the routers can go:
what each step runs is a row of masks over one copy of the weights. Tokens depend on the image, so that their routers stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating, GumbelGating, ThresholdGating
from dydit_cli.dynamic.routers import ChannelRouter, HeadRouter, WidthRouter
from dydit_cli.errors import DyditError

SAME_TIMESTEP = 1e-6
"""Timesteps that differ by less, of the largest in the list, are one: what is left of a number that was cast to fp32 and back."""
SHOWN_TIMESTEPS = 50
"""Of a schedule, in a message; of longer ones the ends are shown."""


class BakedRouter(WidthRouter):
    """Stands where a width router was: it has no weights, and its gating (`BakedGating`) knows the masks."""

    def __init__(self, hidden_size: int, units: int, always_on: bool) -> None:
        nn.Module.__init__(self)
        self.units = units
        self.always_on = always_on

    @staticmethod
    def rows(units: int, always_on: bool) -> int:
        """See `WidthRouter`: none."""
        return 0

    def reset_parameters(self) -> None:
        """See `WidthRouter`: there are none."""

    def shift(self, amount: float) -> None:
        """See `WidthRouter`.

        Raises:
            DyditError: Always, there are no logits.
        """
        raise fixed_widths("Its logits cannot be moved.")

    def forward(self, time_embedding: Tensor) -> Tensor:
        """See `WidthRouter`; only the shape, type and device of the (B, units) result are read."""
        return time_embedding.new_full((len(time_embedding), self.units), torch.inf, dtype=torch.float32)


class BakedHeadRouter(BakedRouter, HeadRouter):
    """In the place of a head router."""


class BakedChannelRouter(BakedRouter, ChannelRouter):
    """In the place of a channel router."""


def fixed_widths(what: str) -> DyditError:
    """The error of whoever wants to change widths that were written down."""
    return DyditError(
        f"The widths of this model are baked. {what}",
        why="Its width routers are gone; what each timestep runs stands in a table.",
        fix="Use the dynamic model that it was exported from; at the baked timesteps both do the same.",
    )


class BakedWidths(nn.Module):
    """The table.

    Args:
        schedules: Timesteps by the name of what asks for them, in the family's own convention.
        depth: L, blocks.
        heads: H.
        groups: G.

    Attributes:
        timesteps: All of them, each once; rows of the masks.
        heads: (S, L, H) masks by rank.
        groups: (S, L, G).
    """

    heads: Tensor
    groups: Tensor

    def __init__(self, schedules: Mapping[str, Sequence[float]], depth: int, heads: int, groups: int) -> None:
        super().__init__()
        self.schedules = {name: [float(t) for t in times] for name, times in schedules.items()}
        self.timesteps = distinct_timesteps(self.schedules)
        self.register_buffer("heads", torch.ones(len(self.timesteps), depth, heads, dtype=torch.bool))
        self.register_buffer("groups", torch.ones(len(self.timesteps), depth, groups, dtype=torch.bool))

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.heads.numel() + self.groups.numel()

    def row_of(self, t: float) -> int | None:
        """The row of a timestep, or None if it is not in the table."""
        row = min(range(len(self.timesteps)), key=lambda index: abs(self.timesteps[index] - t))
        near = SAME_TIMESTEP * max(map(abs, self.timesteps), default=1.0)
        return row if abs(self.timesteps[row] - t) <= near else None

    def shown(self, told: Callable[[float], float]) -> str:
        """The schedules for a message; ``told`` turns a timestep into what the caller would pass."""
        parts = []
        for name, times in self.schedules.items():
            texts = [f"{round(told(t), 6):g}" for t in times]
            if len(texts) > SHOWN_TIMESTEPS:
                texts = [*texts[:4], "...", *texts[-2:]]
            parts.append(f"{', '.join(texts)} ({name}, {len(times)} evaluations)")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class BakedGating(ThresholdGating):
    """Widths out of the table, tokens by the threshold.

    Attributes:
        table: Of the model.
        times: (B,) timesteps in the family's own convention.
        told: Turns such a timestep into what the caller passed; for messages.
    """

    table: BakedWidths
    times: Tensor
    told: Callable[[float], float]

    @cached_property
    def rows(self) -> Tensor:
        """(B,) rows of the table.

        Raises:
            DyditError: For a timestep that is not in it, with those that are.
        """
        found = []
        for t in self.times.tolist():
            row = self.table.row_of(t)
            if row is None:
                raise DyditError(
                    f"No widths are baked for the timestep {round(self.told(t), 6):g}.",
                    why=f"Baked are {self.table.shown(self.told)}.",
                    fix="Run as many steps, by one of these; or export again with the --steps (and --sampler) that you run.",
                )
            found.append(row)
        return torch.tensor(found, device=self.table.heads.device)

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.table.heads[self.rows, block].to(logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.table.groups[self.rows, block].to(logits)


def baked_gating(table: BakedWidths, times: Tensor, gating: Gating, told: Callable[[float], float]) -> Gating:
    """The rule that decides widths of a batch: the table where a threshold would, and masks from elsewhere as they are.

    Raises:
        DyditError: For the noise of training, which needs routers.
    """
    if isinstance(gating, GumbelGating):
        raise fixed_widths("It cannot be fine-tuned.")
    if not isinstance(gating, ThresholdGating):
        return gating
    return BakedGating(gating.keep_bias, table=table, times=times, told=told)


def distinct_timesteps(schedules: Mapping[str, Sequence[float]]) -> list[float]:
    """All timesteps of some schedules, each once, the largest first: an order that a stored dictionary cannot lose."""
    return sorted({float(t) for times in schedules.values() for t in times}, reverse=True)


def baked_schedules(settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """The schedules in a model's configuration.

    Raises:
        DyditError: If there are none.
    """
    found = settings.get("schedules")
    if isinstance(found, Mapping) and found and all(found.values()):
        return {str(name): [float(t) for t in times] for name, times in found.items()}
    raise DyditError(
        "The configuration says that widths are baked, and not for which timesteps.",
        why="Its entry 'baked' has no schedules.",
        fix="Copy the folder again, or export again.",
    )
