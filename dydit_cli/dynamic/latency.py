"""Time in the place of multiply-accumulates: a measured table of what heads, groups and tokens cost, differentiable in the masks.

A block's attention depends on its number of heads, its MLP on the number of groups and the share of tokens. The table holds the
time of whole forwards in which every block has the same numbers, relative to the static model: overheads, caches and whatever else
arithmetic does not know of are in it. Blocks with different numbers are averaged; between the measured points time is linear [ours].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError

VERSION = 1


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model's forward relative to its static form.

    Attributes:
        family: Name of the model's family.
        num_heads, num_groups, depth, num_tokens: Of the model.
        heads: Numbers of heads, ascending.
        attention: Time with so many heads in every block, all else on; one for each of ``heads``.
        groups: Numbers of groups, ascending.
        tokens: Shares of tokens, ascending from 0 to 1.
        mlp: Time with so many groups and such a share of tokens, all heads on: a row for each of ``groups``.
        complete: Time with everything on, which compact execution does not have for nothing.
        measured: On what and how: device, threads, type, batch, rounds, static milliseconds.
    """

    family: str
    num_heads: int
    num_groups: int
    depth: int
    num_tokens: int
    heads: tuple[int, ...]
    attention: tuple[float, ...]
    groups: tuple[int, ...]
    tokens: tuple[float, ...]
    mlp: tuple[tuple[float, ...], ...]
    complete: float
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """The least time that one head, one group and no token leave."""
        return self.attention[0] + min(self.mlp[0]) - self.complete

    def ratio(self, routing: Routing) -> Tensor:
        """The time of each sample's decisions relative to the static model, (B,), with the gradient of the masks."""
        blocks = [
            self._of_block(
                block.heads.float().sum(dim=1),
                block.groups.float().sum(dim=1),
                block.tokens.float().mean(dim=1),
            )
            for block in routing.blocks
        ]
        return torch.stack(blocks).mean(dim=0)

    def _of_block(self, heads: Tensor, groups: Tensor, tokens: Tensor) -> Tensor:
        """What the forward would take if every block had these numbers, each (B,)."""
        attention = interpolated(heads, self.heads, self.attention)
        rows = [interpolated(tokens, self.tokens, row) for row in self.mlp]
        mlp = sum(
            (weight * row for weight, row in zip(_weights(groups, self.groups), rows, strict=True)),
            start=torch.zeros_like(heads),
        )
        return attention + mlp - self.complete

    def check(self, family: str, geometry: Geometry, where: str) -> None:
        """See that the table is one of a model of this shape.

        Raises:
            DyditError: If it is of another.
        """
        own = (self.family, self.num_heads, self.num_groups, self.depth, self.num_tokens)
        wanted = (family, geometry.num_heads, geometry.num_groups, geometry.depth, geometry.num_tokens)
        if own != wanted:
            raise DyditError(
                f"The latency table {where} was measured on another model.",
                why=f"Family, heads, groups, blocks and tokens are {own} there and {wanted} here.",
                fix="Measure one with `dydit bench --model FOLDER --latency-table FILE`.",
            )

    def as_json(self) -> dict[str, Any]:
        """The content of its file."""
        return {"version": VERSION, **asdict(self)}


def interpolated(values: Tensor, points: Sequence[float], heights: Sequence[float]) -> Tensor:
    """A piecewise linear function through ``(points, heights)``, constant beyond them; with a gradient in ``values``."""
    result = torch.full_like(values, heights[0])
    for left, right, low, high in zip(points, points[1:], heights, heights[1:], strict=False):
        result = result + (high - low) / (right - left) * (values.clamp(left, right) - left)
    return result


def _weights(values: Tensor, points: Sequence[float]) -> list[Tensor]:
    """Weights of the points at ``values``: those of the two neighbours, which add up to one."""
    return [
        interpolated(values, points, [float(place == index) for index in range(len(points))])
        for place in range(len(points))
    ]


def read_table(path: str | Path) -> LatencyTable:
    """Read the file of a table.

    Raises:
        DyditError: If it is missing or is none.
    """
    try:
        stated = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if stated.pop("version") != VERSION:
            raise ValueError("it is of another version")
        for name in ("heads", "attention", "groups", "tokens"):
            stated[name] = tuple(stated[name])
        stated["mlp"] = tuple(tuple(float(value) for value in row) for row in stated["mlp"])
        table = LatencyTable(**stated)
        whole = len(table.heads) == len(table.attention) and len(table.groups) == len(table.mlp)
        if not whole or any(len(row) != len(table.tokens) for row in table.mlp):
            raise ValueError("its numbers do not fit together")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DyditError(
            f"{path} is not a latency table.",
            why=f"{type(error).__name__}: {error}.",
            fix="Measure one with `dydit bench --model FOLDER --latency-table FILE`.",
        ) from error
    return table
