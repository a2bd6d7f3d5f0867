"""Compare running times on a machine that does other things too: interleaved rounds, paired ratios, a bootstrap interval.

Clock rates, caches and neighbours change over seconds. A ratio of two means taken minutes apart measures those; a ratio of two runs
that stand side by side does not. So every round runs all sides once, in an order that is reversed every other round, and what is
reported is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dydit_cli.randomness import generator

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class PairedRatio:
    """A ratio of two running times.

    Attributes:
        ratio: Median over the rounds.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        pairs: Rounds.
    """

    ratio: float
    low: float
    high: float
    pairs: int


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
    warmups: int = 1,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time every side once a round.

    Args:
        sides: What to run, by name.
        repetitions: Rounds.
        clock: Seconds; `time.process_time` counts this process alone, over all its threads.
        warmups: Untimed rounds before (weights are packed there, and memory is taken from the system).
        on_run: Called after each timed run, outside the measured span.

    Returns:
        Seconds of every round, by side.
    """
    for _ in range(warmups):
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for repetition in range(repetitions):
        for name in order if repetition % 2 == 0 else reversed(order):
            start = clock()
            sides[name]()
            seconds[name].append(clock() - start)
            on_run()
    return seconds


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> PairedRatio:
    """The median of the rounds' ratios and the interval in which it lies when rounds are drawn again with replacement.

    Args:
        numerators: Seconds of one side, round by round.
        denominators: Seconds of the other side in the same rounds.
        seed: Of the resampling.
    """
    ratios = torch.tensor(numerators, dtype=torch.float64) / torch.tensor(denominators, dtype=torch.float64)
    count = len(ratios)
    picks = torch.randint(count, (RESAMPLES, count), generator=generator(seed, "bootstrap"))
    medians = ratios[picks].quantile(0.5, dim=1)
    tail = (1 - CONFIDENCE) / 2
    return PairedRatio(
        ratio=float(ratios.quantile(0.5)),
        low=float(medians.quantile(tail)),
        high=float(medians.quantile(1 - tail)),
        pairs=count,
    )
