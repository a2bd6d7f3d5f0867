"""All routed heads and channel groups of a model side by side, so that one table says what each range of timesteps keeps.

A table is (R, U): a row for each range of timesteps, a column for each unit, blocks one after the other and in each its heads, its
groups and, where it has an MLP for text, that one's groups; by rank of importance, always-on units included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.dynamic.costs import CostedGeometry
from dydit_cli.dynamic.routers import OrderedWidthRouter, WidthRouter
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import executed_ratio

KINDS = {"heads": "head_router", "groups": "channel_router", "context_groups": "context_channel_router"}
"""Field of `BlockRouting` -> name of the router in a block."""


@dataclass(frozen=True)
class Place:
    """The units of one width router.

    Attributes:
        block: Number of the block.
        kind: Field of `BlockRouting`.
        router: Decides them.
        first: Column of the first.
    """

    block: int
    kind: str
    router: WidthRouter
    first: int

    @property
    def name(self) -> str:
        """For files and messages."""
        return f"blocks.{self.block}.{KINDS[self.kind]}"

    @property
    def columns(self) -> slice:
        """Of its units in a table."""
        return slice(self.first, self.first + self.router.units)


@dataclass(frozen=True)
class Units:
    """The columns of a table.

    Attributes:
        places: Of all width routers, in their order.
        depth: Blocks of the model.
    """

    places: tuple[Place, ...]
    depth: int

    @classmethod
    def of(cls, model: DynamicModel) -> Units:
        """Those of a model; none where it has no width routers."""
        places: list[Place] = []
        for index, block in enumerate(model.dynamic_blocks):
            for kind, name in KINDS.items():
                router = getattr(block, name, None)
                if router is not None:
                    places.append(Place(index, kind, router, _end(places)))
        return cls(tuple(places), len(model.dynamic_blocks))

    @property
    def count(self) -> int:
        """U."""
        return _end(self.places)

    def everything(self, rows: int) -> Tensor:
        """(rows, U) bool: all on."""
        return torch.ones(rows, self.count, dtype=torch.bool)

    def always_on(self) -> Tensor:
        """(U,) bool: units without a router row."""
        fixed = torch.zeros(self.count, dtype=torch.bool)
        for place in self.places:
            fixed[place.first] = place.router.always_on
        return fixed

    def nested(self) -> Tensor:
        """(U,) bool: units that can only be off if all behind them are, as routers of ordered width decide."""
        ordered = torch.zeros(self.count, dtype=torch.bool)
        for place in self.places:
            ordered[place.columns] = isinstance(place.router, OrderedWidthRouter)
        return ordered

    def lasts(self) -> Tensor:
        """(U,) bool: the last unit of each router."""
        last = torch.zeros(self.count, dtype=torch.bool)
        for place in self.places:
            last[place.columns.stop - 1] = True
        return last

    def routing(self, table: Tensor, num_tokens: int) -> Routing:
        """A table's rows as the decisions of a batch, every token kept.

        Args:
            table: (B, U), of any type; gradients pass.
            num_tokens: N.
        """
        masks: list[dict[str, Tensor]] = [{} for _ in range(self.depth)]
        for place in self.places:
            masks[place.block][place.kind] = table[:, place.columns]
        tokens = torch.ones(len(table), num_tokens, device=table.device)
        return Routing(tuple(BlockRouting(tokens=tokens, **block) for block in masks))

    def table(self, routing: Routing) -> Tensor:
        """The decisions of a batch as a bool table (B, U)."""
        parts = [getattr(routing.blocks[place.block], place.kind) for place in self.places]
        return torch.cat(parts, dim=1) > 0

    def costs(self, geometry: CostedGeometry, num_tokens: int) -> Tensor:
        """(U,) fp64: what each unit adds to the ratio of MACs, every token kept; all together are 1."""
        on = torch.ones(1, self.count, requires_grad=True)
        ratio = executed_ratio(self.routing(on, num_tokens), geometry)
        return torch.autograd.grad(ratio.sum(), on)[0][0].double()

    def share(self, table: Tensor, kind: str) -> Tensor:
        """(R,) of a table: the share of the units of a kind that is on, the mean over blocks."""
        parts = [table[:, place.columns].double().mean(dim=1) for place in self.places if place.kind == kind]
        return torch.stack(parts).mean(dim=0)


def _end(places: Sequence[Place]) -> int:
    return places[-1].columns.stop if places else 0
