"""The accelerated sides of a benchmark: copies of a model that run static and compact compiled, or as CUDA graphs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from dydit_cli.families.dynamic_model import DynamicModel


@dataclass(frozen=True)
class Acceleration:
    """Makes accelerated twins of a model that share its weights, so that the other sides stay as they are.

    Attributes:
        compile: Whether to make twins that run compiled blocks.
        graphs: Whether to make twins that record their steps as CUDA graphs.
        token_capacity: Of the compact one of these.
    """

    compile: bool = False
    graphs: bool = False
    token_capacity: float | None = None

    def models(self, model: DynamicModel) -> dict[str, DynamicModel]:
        """The twins by side; they compile when they first run, and record what they see again."""
        twins: dict[str, DynamicModel] = {}
        if self.compile:
            twins["compiled_static"] = copy.copy(model).set_execution("static", compile=True)
            twins["compiled"] = copy.copy(model).set_execution("compact", compile=True)
        if self.graphs:
            twins["graphed_static"] = copy.copy(model).set_execution("static", graphs=True)
            twins["graphed"] = copy.copy(model).set_execution(
                "compact", graphs=True, token_capacity=self.token_capacity
            )
        return twins
