"""Seconds an image, side by side: what a table says of speed must not depend on what else the machine did meanwhile.

In every round each model samples a batch, and the order turns from round to round; the median of the paired ratios counts. Static models
run in static execution and, planned, in compact execution, all in every round, and the faster by its median counts: a baseline gets
whatever helps it, and not by the chance of a few runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dydit_cli import load_model
from dydit_cli.artifacts.manifest import device_description
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.sampling.generate import generate

BATCH = 64
PAIRS = 9
SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model as it is timed.

    Attributes:
        folder: Of the model.
        executions: Those to try, in every round; the faster counts.
    """

    folder: Path
    executions: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        seconds_per_image: Median over the rounds, of the faster execution.
        time_ratio: Median of the paired ratios to the control's faster execution.
        low, high: 95 % interval of that median, by the order of the ratios.
        execution: The faster one.
        control_execution: The control's faster one.
        pairs: Rounds.
        batch: Images at a time.
        threads: Of torch.
        device: In words.
    """

    seconds_per_image: float
    time_ratio: float
    low: float
    high: float
    execution: str
    control_execution: str
    pairs: int
    batch: int
    threads: int
    device: str


def time_beside(
    subject: Subject, control: Subject, sampling: dict[str, Any], *, pairs: int = PAIRS, batch: int = BATCH
) -> Timing:
    """Time a model beside the control.

    Args:
        subject: What is timed.
        control: The static model, fine-tuned as long.
        sampling: Sampler, steps and guidance.
        pairs: Rounds.
        batch: Images at a time.
    """
    own, its = (
        [_sampler(each, name, sampling, batch) for name in each.executions] for each in (subject, control)
    )
    runs = [*own, *its]
    # By run, its seconds in each round.
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(pairs):
        for index in range(len(runs)) if number % 2 == 0 else reversed(range(len(runs))):
            taken[index].append(_seconds(runs[index]))
    mine, others = _faster(taken[: len(own)]), _faster(taken[len(own) :])
    seconds = taken[mine]
    ratios = sorted(one / other for one, other in zip(seconds, taken[len(own) + others], strict=True))
    low, high = _order_interval(ratios)
    return Timing(
        seconds_per_image=median(seconds) / batch,
        time_ratio=median(ratios),
        low=low,
        high=high,
        execution=subject.executions[mine],
        control_execution=control.executions[others],
        pairs=pairs,
        batch=batch,
        threads=torch.get_num_threads(),
        device=device_description("cpu"),
    )


def _sampler(subject: Subject, execution: str, sampling: dict[str, Any], batch: int) -> Callable[[], None]:
    """A function that samples one batch."""
    model: DynamicModel = load_model(subject.folder, execution=execution, convention="native")

    def run() -> None:
        for _ in generate(model, num_images=batch, batch_size=batch, seed=SEED, **sampling):
            pass

    run()
    return run


def _faster(taken: Sequence[Sequence[float]]) -> int:
    """The index of the one with the least median."""
    medians = [median(seconds) for seconds in taken]
    return medians.index(min(medians))


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _order_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The ordered values between which the median lies with 95 % (binomial): of nine the second and the eighth.

    Of fewer than six values the first and the last, which is less.
    """
    count, outside, off = len(ordered), 0.0, -1
    while 2 * (outside := outside + comb(count, off + 1) / 2**count) <= 0.05:
        off += 1
    return ordered[max(0, off)], ordered[-1 - max(0, off)]
