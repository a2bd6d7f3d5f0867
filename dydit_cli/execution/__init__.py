"""How masks become arithmetic: three executors of the same layers that must agree.

*Dense* multiplies by masks, so that gradients flow: training. *Compact* slices weights and gathers tokens, so that only kept
units cost: inference. *Static* ignores the routers: the complete model.
"""

from __future__ import annotations

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.execution.compact import CompactExecutor
from dydit_cli.execution.dense import DenseExecutor
from dydit_cli.execution.interface import BlockWidth, DynamicBlock, Executor, Modulation
from dydit_cli.execution.plan import WidthPlan
from dydit_cli.execution.static import StaticExecutor

__all__ = [
    "EXECUTIONS",
    "BlockWidth",
    "CompactExecutor",
    "DenseExecutor",
    "DynamicBlock",
    "Executor",
    "Modulation",
    "StaticExecutor",
    "WidthPlan",
    "executor_named",
]

EXECUTIONS = ("dense", "compact", "static")


def executor_named(name: str) -> Executor:
    """Return a new executor: ``dense``, ``compact`` or ``static``.

    Raises:
        DyditError: For any other name.
    """
    if name == "dense":
        return DenseExecutor()
    if name == "compact":
        return CompactExecutor()
    if name == "static":
        return StaticExecutor()
    raise DyditError(
        f"There is no execution called '{name}'.",
        why=f"A model runs as one of: {', '.join(EXECUTIONS)}.",
        fix=f"Pass one of these names; {did_you_mean(name, EXECUTIONS) or 'compact is the fast one'}",
    )
