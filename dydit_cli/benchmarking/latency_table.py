"""Measure the latency table of a model: whole forwards in compact execution, as many as there are points, interleaved.

The routers are set so that every block has the numbers of a point, and the widths are planned, as in sampling. A round runs all
points and the static model in an order that is reversed every other round; what counts is the median of the rounds' ratios, so that
a machine that slows down for a while slows down both sides of a ratio.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dydit_cli.artifacts.manifest import device_description
from dydit_cli.benchmarking.contest import synchronize
from dydit_cli.benchmarking.masks import Case, impose
from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.dynamic.latency import LatencyTable
from dydit_cli.errors import DyditError
from dydit_cli.execution import StaticExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of

HEAD_POINTS, GROUP_POINTS = 9, 5
TOKEN_SHARES = (0.0, 0.25, 0.5, 0.75)
"""And nearly all: with every token kept compact execution need not gather, a step in time that no training should aim at."""

OPEN = 1e3
"""A bias larger than what token routers make of their inputs."""

Progress = Callable[[int, int], None]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Point:
    """A case with the routers that impose it.

    Attributes:
        case: What is on.
        routers: Values of the routers' parameters.
        ratios: Time relative to the static model, round by round.
    """

    case: Case
    routers: list[Tensor]
    ratios: list[float]

    def impose(self, model: DynamicModel) -> None:
        """Put them into a model."""
        for parameter, value in zip(model.router_parameters(), self.routers, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def points_of(model: DynamicModel, cases: Sequence[Case], inputs: Inputs, seed: int) -> list[Point]:
    """The points of cases; the model's routers are as before afterwards."""
    own = Point(Case(0, 0, 0.0), [parameter.clone() for parameter in model.router_parameters()], [])
    points = []
    for case in cases:
        for block in model.dynamic_blocks:
            # With every ReLU open no two tokens have the same logit, of which a share could not be chosen.
            block.token_router.reduce.bias.fill_(OPEN)
        impose(model, case, "scattered", [inputs], seed)
        points.append(Point(case, [parameter.clone() for parameter in model.router_parameters()], []))
        # What imposes a case may have wiped out what the next one needs: token routers without weights know no order.
        own.impose(model)
    return points


@torch.no_grad()
def measure_table(
    model: DynamicModel,
    inputs: Inputs,
    *,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> LatencyTable:
    """Time a model at all points of its table.

    Args:
        model: On its device; it is copied.
        inputs: State, timestep and labels of a forward, whose batch is the table's.
        rounds: Of which the median counts.
        clock: Seconds.
        seed: Of the masks.
        on_progress: Told how many rounds of how many are done.

    Raises:
        DyditError: For a family whose blocks are not all alike.
    """
    model = copy.deepcopy(check_family(model)).eval()
    geometry, device = model.geometry, model.device
    least = int(geometry.always_on)
    heads = _counts(least, geometry.num_heads, HEAD_POINTS)
    groups = _counts(least, geometry.num_groups, GROUP_POINTS)
    nearly = 1.0 - 1.0 / (geometry.num_tokens * len(inputs[0]))
    tokens = (*TOKEN_SHARES, nearly)
    cases = [Case(count, geometry.num_groups, nearly) for count in heads]
    cases += [Case(geometry.num_heads, count, share) for count in groups for share in tokens]
    points = points_of(model, cases, inputs, seed)

    def seconds(run: Callable[[], object]) -> float:
        run()  # Packs weights where they changed.
        synchronize(device)
        started = clock()
        run()
        synchronize(device)
        return clock() - started

    static_s = []
    for number in range(rounds + 1):
        taken: dict[int | None, float] = {}
        order: list[int | None] = [None, *range(len(points))]
        for place in order if number % 2 == 0 else reversed(order):
            if place is None:
                taken[place] = seconds(
                    lambda: model.denoise(*inputs, executor=StaticExecutor(), gating=CompleteGating())
                )
                continue
            points[place].impose(model)
            model.set_execution("static").set_execution("compact").plan([float(inputs[1][0])], inputs[2])
            taken[place] = seconds(lambda: model.denoise(*inputs))
        on_progress(number, rounds)
        if number == 0:
            continue  # The first round takes memory from the system.
        static_s.append(taken[None])
        for place, point in enumerate(points):
            point.ratios.append(taken[place] / taken[None])
    ratios = [_median(point.ratios) for point in points]
    of_groups = ratios[len(heads) :]
    return LatencyTable(
        family=model.family,
        num_heads=geometry.num_heads,
        num_groups=geometry.num_groups,
        depth=geometry.depth,
        num_tokens=geometry.num_tokens,
        heads=tuple(heads),
        attention=tuple(ratios[: len(heads)]),
        groups=tuple(groups),
        tokens=(*TOKEN_SHARES, 1.0),
        mlp=tuple(
            tuple(of_groups[row * len(tokens) : (row + 1) * len(tokens)]) for row in range(len(groups))
        ),
        # Measured twice, at the end of either axis.
        complete=(ratios[len(heads) - 1] + ratios[-1]) / 2,
        measured={
            "device": device_description(device),
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch": len(inputs[0]),
            "rounds": rounds,
            "static_ms": _median(static_s) * 1000,
        },
    )


@dataclass(frozen=True)
class TableCheck:
    """What a table says of a model and what is measured.

    Attributes:
        predicted: Time relative to the static model, by the table; the mean over the noise levels.
        measured: The median over the rounds of the same, measured.
        rounds: Of the measurement.
    """

    predicted: float
    measured: float
    rounds: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "predicted": self.predicted,
            "measured": self.measured,
            "difference": self.predicted - self.measured,
            "rounds": self.rounds,
        }


@torch.no_grad()
def check_table(
    model: DynamicModel,
    table: LatencyTable,
    levels: Sequence[Inputs],
    *,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    on_progress: Progress = lambda done, total: None,
) -> TableCheck:
    """Compare what a table predicts of a model's own routers with what they take.

    Args:
        model: In eval mode, on its device.
        table: Of a model of this shape.
        levels: Inputs of the forwards that are timed, one a noise level.
        rounds: Of which the median counts.
        clock: Seconds.
        on_progress: Told how many rounds of how many are done.
    """
    table.check(model.family, check_family(model).geometry, "given")
    model.set_execution("static").set_execution("compact")
    model.plan([float(level[1][0]) for level in levels], levels[0][2])
    predicted = [table.ratio(model.denoise(*level)[1]).mean() for level in levels]

    def seconds(run: Callable[[Inputs], object]) -> float:
        started = clock()
        for level in levels:
            run(level)
        synchronize(model.device)
        return clock() - started

    sides: dict[str, Callable[[Inputs], object]] = {
        "static": lambda level: model.denoise(*level, executor=StaticExecutor(), gating=CompleteGating()),
        "compact": lambda level: model.denoise(*level),
    }
    ratios = []
    for number in range(rounds + 1):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        taken = {name: seconds(sides[name]) for name in order}
        on_progress(number, rounds)
        if number:
            ratios.append(taken["compact"] / taken["static"])
    return TableCheck(float(torch.stack(predicted).mean()), _median(ratios), rounds)


def check_family(model: DynamicModel) -> DynamicTransformer:
    """The model, if a table can describe it.

    Raises:
        DyditError: If its blocks are not all of one kind.
    """
    geometry = model.geometry
    alike = isinstance(model, DynamicTransformer) and len(set(geometry.block_costs())) == 1
    if alike and not geometry.ordered_width and not geometry.is_pruned:
        return model
    kind = f"{family_of(model).title} of ordered width" if alike else family_of(model).title
    raise DyditError(
        f"There is no latency table for a {kind}.",
        why="Tables are written for models whose blocks are all alike and choose units freely (DiT, SiT).",
        fix="Train it with the target on multiply-accumulates, which is the default.",
    )


def _counts(least: int, most: int, points: int) -> list[int]:
    """Whole numbers from ``max(least, 1)`` to ``most``, about evenly."""
    low = max(least, 1)
    steps = min(points - 1, most - low)
    return (
        sorted({round(low + (most - low) * step / steps) for step in range(steps + 1)}) if steps else [most]
    )


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
