"""How masks become arithmetic: three executors of the same layers that must agree.

*Dense* multiplies by masks, so that gradients flow: training. *Compact* slices weights and gathers tokens, so that only kept
units cost: inference. *Static* ignores the routers: the complete model.
"""

from __future__ import annotations

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.execution.compact import CompactExecutor
from dydit_cli.execution.compiled import CompiledCompactExecutor, CompiledStaticExecutor
from dydit_cli.execution.dense import DenseExecutor
from dydit_cli.execution.interface import BlockWidth, DynamicBlock, Executor, Modulation, StepModulation
from dydit_cli.execution.plan import WidthPlan
from dydit_cli.execution.static import StaticExecutor

__all__ = [
    "EXECUTIONS",
    "BlockWidth",
    "CompactExecutor",
    "CompiledCompactExecutor",
    "CompiledStaticExecutor",
    "DenseExecutor",
    "DynamicBlock",
    "Executor",
    "Modulation",
    "StaticExecutor",
    "StepModulation",
    "WidthPlan",
    "executor_named",
]

EXECUTIONS = ("dense", "compact", "static")


def executor_named(name: str, compile: bool = False) -> Executor:  # noqa: A002
    """Return a new executor: ``dense``, ``compact`` or ``static``.

    Args:
        name: Which.
        compile: Whether blocks are compiled (`compiled.py`); not dense ones.

    Raises:
        DyditError: For any other name, and for dense execution compiled.
    """
    if name == "dense" and not compile:
        return DenseExecutor()
    if name == "compact":
        return CompiledCompactExecutor() if compile else CompactExecutor()
    if name == "static":
        return CompiledStaticExecutor() if compile else StaticExecutor()
    if name == "dense":
        raise DyditError(
            "Dense execution is not compiled.",
            why="It is there for training and for comparison; what it multiplies by zero costs time, compiled or not.",
            fix="Choose compact (the fast one) or static execution, or leave compile out.",
        )
    raise DyditError(
        f"There is no execution called '{name}'.",
        why=f"A model runs as one of: {', '.join(EXECUTIONS)}.",
        fix=f"Pass one of these names; {did_you_mean(name, EXECUTIONS) or 'compact is the fast one'}",
    )
