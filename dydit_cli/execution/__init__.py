"""How masks become arithmetic: three executors of the same layers that must agree.

*Dense* multiplies by masks, so that gradients flow: training. *Compact* slices weights and gathers tokens, so that only kept
units cost: inference. *Static* ignores the routers: the complete model.
"""

from __future__ import annotations

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.execution.capacity import CapacityExecutor
from dydit_cli.execution.compact import CompactExecutor
from dydit_cli.execution.compiled import CompiledCompactExecutor, CompiledStaticExecutor
from dydit_cli.execution.dense import DenseExecutor
from dydit_cli.execution.graphs import graphed_executor
from dydit_cli.execution.interface import (
    BlockWidth,
    DynamicBlock,
    Executor,
    Modulation,
    Step,
    StepModulation,
    StepRunner,
)
from dydit_cli.execution.plan import WidthPlan
from dydit_cli.execution.static import StaticExecutor

__all__ = [
    "EXECUTIONS",
    "BlockWidth",
    "CapacityExecutor",
    "CompactExecutor",
    "CompiledCompactExecutor",
    "CompiledStaticExecutor",
    "DenseExecutor",
    "DynamicBlock",
    "Executor",
    "Modulation",
    "StaticExecutor",
    "Step",
    "StepModulation",
    "StepRunner",
    "WidthPlan",
    "check_execution",
    "executor_named",
    "step_runner",
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


def check_execution(name: str, compile: bool, graphs: bool, token_capacity: float | None) -> None:  # noqa: A002
    """Raise a `DyditError` if the options of an execution do not go together, or there is no such execution."""
    if name not in EXECUTIONS:
        executor_named(name, compile)
    if compile and (graphs or token_capacity is not None):
        raise DyditError(
            f"Compiling does not go with {'CUDA graphs' if graphs else 'a token capacity'}.",
            why="Compiled blocks choose their tokens with shapes that change, the others with static ones.",
            fix="Leave out one of the two.",
        )
    if token_capacity is not None and name != "compact":
        raise DyditError(
            f"A token capacity does not go with {name} execution.",
            why="It is the room for tokens that compact execution keeps; the others compute all of them.",
            fix="Choose compact execution, or leave the capacity out.",
        )


def step_runner(name: str, graphs: bool, token_capacity: float | None) -> Executor:
    """A new executor with static shapes for blocks of DiT's form, see `check_execution`.

    Args:
        name: ``compact``, or ``static`` with graphs.
        graphs: Whether steps are recorded as CUDA graphs.
        token_capacity: Share of a batch's tokens that MLPs have room for; None, with graphs, learns it.

    Raises:
        DyditError: For what cannot be, and for graphs where there is no CUDA.
    """
    if graphs or token_capacity is None:
        return graphed_executor(name, token_capacity)
    return CapacityExecutor(token_capacity)
