"""Time single forwards: static, dense and compact of the same weights and inputs, and diffusers' model beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dydit_cli.benchmarking.baseline import DiffusersStatic
from dydit_cli.benchmarking.compiling import Acceleration
from dydit_cli.benchmarking.contest import Contest
from dydit_cli.benchmarking.masks import Case
from dydit_cli.benchmarking.report import Row, row_of
from dydit_cli.benchmarking.subjects import Inputs, Subject
from dydit_cli.dynamic.gates import CompleteGating, ImposedGating
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.execution import DenseExecutor, StaticExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import executed_ratio, macs_of

Side = Callable[..., object]


@torch.no_grad()
def time_forwards(
    subject: Subject,
    case: Case | None,
    batch: int,
    contest: Contest,
    *,
    diffusers: DiffusersStatic | None,
    acceleration: Acceleration,
    dense: bool,
    seed: int,
) -> Row:
    """One row: a round runs every side over all of the subject's inputs.

    Compact execution has a plan, as in sampling; making it is not part of the time (it is in that of whole runs).
    """
    model = subject.model
    subject.impose(case, batch)
    inputs = subject.inputs(batch)
    # By way of static, so that the executor is new.
    model.set_execution("static").set_execution("compact", token_capacity=acceleration.token_capacity)
    prepare(model, inputs)
    sides: dict[str, Side] = {
        "static": partial(model.denoise, executor=StaticExecutor(), gating=CompleteGating())
    }
    if diffusers is not None:
        sides["diffusers"] = diffusers.denoise
    if dense:
        sides["dense"] = partial(model.denoise, executor=DenseExecutor())
    sides["compact"] = model.denoise
    for name, each in acceleration.models(model).items():
        if each.execution == "compact":
            prepare(each, inputs)
        sides[name] = each.denoise
    executed = [model.denoise(*each)[1] for each in inputs]
    difference = max(
        _difference(model, each, routing) for each, routing in zip(inputs, executed, strict=True)
    )
    together = joined(executed)
    geometry = model.geometry
    seconds = contest.run(
        title_of(case, batch, subject), {name: partial(_sweep, side, inputs) for name, side in sides.items()}
    )
    return row_of(
        seconds,
        ideal=macs_of(geometry, together).total / macs_of(geometry).total,
        forwards=len(inputs),
        seed=seed,
        case=words_of(case, subject),
        batch=batch,
        steps=None,
        **_shares(together),
        ratio=float(executed_ratio(together, geometry).mean()),
        difference_to_dense=difference,
    )


def prepare(model: DynamicModel, inputs: Sequence[Inputs]) -> None:
    """Plan the schedule of ``inputs``, as sampling does before it begins."""
    model.plan([float(each.timestep[0]) for each in inputs], inputs[0].class_labels)


def words_of(case: Case | None, subject: Subject) -> str:
    """What is on, for people."""
    return "live routing" if case is None else case.words(subject.model.geometry)


def title_of(case: Case | None, batch: int, subject: Subject) -> str:
    """A row's name while it is measured."""
    return f"batch {batch}, {words_of(case, subject)}"


def joined(routings: Sequence[Routing]) -> Routing:
    """The decisions of several forwards as those of one larger batch."""
    return Routing(
        tuple(
            BlockRouting(
                torch.cat([block.heads for block in blocks]),
                torch.cat([block.groups for block in blocks]),
                torch.cat([block.tokens for block in blocks]),
            )
            for blocks in zip(*(routing.blocks for routing in routings), strict=True)
        )
    )


def _sweep(side: Side, inputs: Sequence[Inputs]) -> None:
    for each in inputs:
        side(*each)


def _shares(routing: Routing) -> dict[str, Any]:
    return {
        "heads": float(routing.heads.float().mean()),
        "groups": float(routing.groups.float().mean()),
        "tokens": float(routing.tokens.float().mean()),
    }


def _difference(model: DynamicModel, inputs: Inputs, routing: Routing) -> float:
    """Compact against dense execution of the masks that compact execution decided."""
    gating = ImposedGating(routing)
    compact, _ = model.denoise(*inputs, gating=gating)
    dense, _ = model.denoise(*inputs, executor=DenseExecutor(), gating=gating)
    return float((compact - dense).abs().max() / dense.abs().max())
