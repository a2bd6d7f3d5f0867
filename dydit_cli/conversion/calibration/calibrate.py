"""Calibrate a fresh conversion: measure what each range of timesteps needs, share the budget out, and set the width routers so.

Rounds give up a part of the MACs each, and measure anew in between. What comes out is a model that runs at its ratio without training,
and a start of fine-tuning from which every width router can move. Token routers stay at their start: which tokens matter depends on
the image, and no table of timesteps says it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.conversion.calibration.allocation import allocate
from dydit_cli.conversion.calibration.fitting import LEVELS, fit_routers
from dydit_cli.conversion.calibration.report import Calibration, RangeReport
from dydit_cli.conversion.calibration.rewriting import rewrite_tensors
from dydit_cli.conversion.calibration.sensitivity import Samples, batch_size_for, sensitivity
from dydit_cli.conversion.calibration.units import Units
from dydit_cli.data import DataSplit, open_data
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family, Source, require
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives import HeldOutDraws, Objective, measure, objective_of

STEP = 0.05
"""Share of all MACs that one round gives up, at most: later scores are those of a model that has lost what earlier rounds took."""
IMAGES = 250
"""Held-out samples on which the result is measured."""
LEAST = 4
"""Samples of a range and round."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tables:
    """What was measured and decided.

    Attributes:
        units: The columns.
        importance: (R, U), the scores at the complete model.
        kept: (R, U) bool, the allocation that the routers were fitted to.
    """

    units: Units
    importance: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Calibrated:
    """A calibration and what it was made of."""

    report: Calibration
    tables: Tables


def check_calibration(family: Family, source: Source, prune: float | None) -> None:
    """See that a source can be calibrated, before anything takes time.

    Raises:
        DyditError: If its family is not measured on data, it has trained routers, or it is to be cut instead.
    """
    if prune is not None:
        raise DyditError(
            "A pruned model cannot be calibrated.",
            why="What --prune cuts out is gone for good, and no router decides about it.",
            fix="Leave out --prune or --calibrate.",
        )
    require(family, "--calibrate")
    if source.dynamic:
        raise DyditError(
            "The file's routers were trained; a calibration would overwrite them.",
            why="It sets the width routers of a static checkpoint's conversion.",
            fix="Leave --calibrate out, or convert the static checkpoint.",
        )


def calibrate_model(
    model: DynamicModel,
    data: str | Path,
    *,
    target: float,
    samples: int,
    ranges: int,
    seed: int,
    device: str,
    on_progress: Progress,
) -> Calibrated:
    """Open the data, calibrate on a device, and put the model back on the CPU; see `calibrate`."""
    check_ratio(model, Units.of(model), target)
    split = open_data(data, geometry=model.geometry)
    model.to(find_device(device))
    made = calibrate(
        model, split, target=target, samples=samples, ranges=ranges, seed=seed, on_progress=on_progress
    )
    model.to("cpu")
    return made


def calibrate_folder(
    folder: Path,
    data: str | Path,
    *,
    target: float,
    samples: int,
    ranges: int,
    seed: int,
    device: str,
    on_progress: Progress,
) -> Calibrated:
    """Calibrate an artifact that is written already, and put its routers into its files; see `calibrate`.

    Its conversion never had the whole model in memory; this has, as the Taylor ranking does.
    """
    model = load_model(folder, execution="dense", convention="native")
    made = calibrate_model(
        model,
        data,
        target=target,
        samples=samples,
        ranges=ranges,
        seed=seed,
        device=device,
        on_progress=on_progress,
    )
    routers = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".linear.")[0].endswith("_router")
    }
    rewrite_tensors(folder, routers)
    return made


def calibrate(
    model: DynamicModel,
    data: DataSplit,
    *,
    target: float,
    samples: int,
    ranges: int,
    seed: int,
    on_progress: Progress,
) -> Calibrated:
    """Set the width routers of a model to a ratio, by what its loss on training samples says.

    Args:
        model: Freshly converted, its units in order; its width routers are changed in place.
        data: Training samples to measure on, held-out ones to judge by.
        target: The ratio of attention and MLP MACs.
        samples: Training samples of a round, shared among the ranges.
        ranges: Equal parts of the levels that a sampler visits.
        seed: Of samples and noise.
        on_progress: Called as work goes on.

    Raises:
        DyditError: If the ratio is out of reach, or there are too few samples for the ranges.
    """
    began = time.perf_counter()
    units, objective = Units.of(model), objective_of(model)
    costs = check_ratio(model, units, target)
    if samples < LEAST * ranges:
        raise DyditError(
            f"{samples} samples are too few for {ranges} ranges of timesteps.",
            why=f"Each range is judged by its own samples, at least {LEAST} of them.",
            fix=f"Set calibrate_samples to {LEAST * ranges} or more, or calibrate_ranges to fewer.",
        )
    model.requires_grad_(False)
    drawn = Samples(data.train, objective, ranges, samples // ranges, seed, batch_size_for(model.geometry))
    rounds = math.ceil(round((1 - target) / STEP, 6))
    kept, importance = units.everything(ranges), None
    for turn in range(rounds):
        on_progress("measuring what timesteps need", turn, rounds)
        scores = sensitivity(model, units, kept, drawn, turn)
        importance = scores if importance is None else importance
        kept = allocate(
            kept,
            scores,
            costs,
            fixed=units.always_on(),
            nested=units.nested(),
            lasts=units.lasts(),
            target=1 - (1 - target) * (turn + 1) / rounds,
        )
    if importance is None:
        raise TypeError("a target below 1 takes at least one round")
    fit = fit_routers(model, units, kept, objective, target)
    on_progress("measuring the calibrated model", 0, 1)
    draws = HeldOutDraws(data.held_out, objective, IMAGES)
    before = measure(model, draws, executor=model.make_executor("static"))
    after = measure(model, draws, executor=model.make_executor("compact"))
    report = Calibration(
        target_ratio=target,
        ratio=fit.ratio,
        static_loss=before.losses["loss"],
        loss=after.losses["loss"],
        held_out_images=after.images,
        agreement=fit.agreement,
        shift=fit.shift,
        samples=drawn.ranges * drawn.per_range,
        rounds=rounds,
        data=data.train.describe(),
        ranges=_ranges(model, units, objective, ranges),
        seconds=time.perf_counter() - began,
    )
    return Calibrated(report, Tables(units, importance, kept))


def check_ratio(model: DynamicModel, units: Units, target: float) -> Tensor:
    """See that the width alone can come down to a ratio; returns what each unit costs, (U,) shares of all MACs.

    Raises:
        DyditError: If the always-on units cost more, or nothing is to be saved.
    """
    if not 0 < target < 1:
        raise DyditError(
            f"There is nothing to calibrate at a ratio of {target:g}.",
            why="At 1 everything is on, as it is without --calibrate.",
            fix="Set calibrate_ratio between 0 and 1, such as 0.8, or leave --calibrate out.",
        )
    costs = units.costs(model.geometry, model.geometry.num_tokens)
    floor = float(costs[units.always_on()].sum()) + max(0.0, 1 - float(costs.sum()))
    if target < floor:
        raise DyditError(
            f"A ratio of {target:g} cannot be calibrated: width alone reaches {floor:.4f} in this model.",
            why="One head and one channel group of every block are always on, and no token is skipped before training.",
            fix=f"Set calibrate_ratio to {math.ceil(floor * 100) / 100:.2f} or more; fine-tuning goes further down.",
        )
    return costs


@torch.no_grad()
def _ranges(model: DynamicModel, units: Units, objective: Objective, count: int) -> tuple[RangeReport, ...]:
    """What the routers decide, range by range."""
    times = objective.grid(count * LEVELS).to(model.device)
    routing = model.routing(times).cpu()
    ratios = executed_ratio(routing, model.geometry).view(count, LEVELS).mean(dim=1)
    decided = units.table(routing)
    shares = [units.share(decided, kind).view(count, LEVELS).mean(dim=1) for kind in ("heads", "groups")]
    noise = objective.noise_level(times).cpu().view(count, LEVELS).mean(dim=1)
    edges = times.cpu().view(count, LEVELS)
    return tuple(
        RangeReport(
            float(part.min()), float(part.max()), float(level), float(ratio), float(heads), float(groups)
        )
        for part, level, ratio, heads, groups in zip(edges, noise, ratios, *shares, strict=True)
    )
