"""What a target refers to: multiply-accumulates by formula, or time by a measured table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.latency import LatencyTable, read_table
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import executed_ratio
from dydit_cli.recipe.schema import FinetuneSection

Cost = Callable[[Routing, Geometry], Tensor]
"""(B,) costs relative to the static model, with the gradient of the masks."""


@dataclass(frozen=True)
class TimeCost:
    """Time by a table.

    Attributes:
        table: Of a model of this shape.
    """

    table: LatencyTable

    def __call__(self, routing: Routing, geometry: Geometry) -> Tensor:
        """See `Cost`."""
        return self.table.ratio(routing)


def cost_of(settings: FinetuneSection, model: DynamicModel) -> Cost:
    """The cost that a run brings to its target.

    Raises:
        DyditError: If the table is missing, damaged or another model's, or the target is below what it can reach.
    """
    if settings.target == "macs":
        return executed_ratio
    where = str(settings.latency_table)
    table = read_table(where)
    table.check(model.family, model.geometry, where)
    if settings.target_ratio < table.floor:
        raise DyditError(
            f"A target of {settings.target_ratio:g} of the static model's time cannot be reached.",
            why=f"With one head, one group and no token the forward takes {table.floor:.3f} of it, by {where}.",
            fix=f"Set target_ratio to {table.floor + 0.005:.2f} or more.",
        )
    return TimeCost(table)
