"""A measured value with its interval, and how the interval came about.

Intervals are 95 % and answer one question: how far would the value move if as many *other* samples were drawn? The reference
is taken as fixed. They say nothing about the bias that a small number of samples brings, which for distances is upwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959963984540054
DELTA = "delta method"
WILSON = "Wilson"
JACKKNIFE = "jackknife over 10 groups"
BOOTSTRAP = "bootstrap"

RESAMPLES = 2000


@dataclass(frozen=True)
class Measure:
    """A value.

    Attributes:
        value: The estimate.
        low: Lower end of its 95 % interval; None where there is none.
        high: Upper end.
        method: Where the interval comes from.
    """

    value: float
    low: float | None = None
    high: float | None = None
    method: str | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length, for a ± beside the value."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def from_influence(value: float, influence: Tensor, clusters: Tensor | None = None) -> Measure:
    """A value with the interval of the delta method (the infinitesimal jackknife).

    Args:
        value: The estimate, a function of the samples' empirical distribution.
        influence: (N,) its derivative with respect to the weight of each sample.
        clusters: (N,) whole numbers from 0; samples of one cluster (frames of a video) are not independent and count together.
    """
    count = len(influence)
    centred = influence.double() - influence.double().mean()
    if clusters is not None:
        # The mean over N of clustered terms has the variance of the cluster sums.
        sums = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64).index_add(0, clusters, centred)
        groups, square = len(sums), float(sums.square().sum()) / count**2
    else:
        groups, square = count, float(centred.square().sum()) / count**2
    if groups < 2:
        return Measure(value)
    half = Z * math.sqrt(square * groups / (groups - 1))
    return Measure(value, value - half, value + half, DELTA)


def share(hits: int, count: int) -> Measure:
    """A share of independent trials with Wilson's interval (Wilson 1927), which stays within 0 and 1."""
    found = hits / count
    centre = (found + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(found * (1 - found) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return Measure(found, max(0.0, centre - half), min(1.0, centre + half), WILSON)


def bootstrapped_mean(values: Tensor, generator: torch.Generator) -> Measure:
    """A mean over independent values with the percentile interval of the bootstrap."""
    values = values.double()
    count = len(values)
    if count < 2:
        return Measure(float(values.mean()))
    # By resample, so that 50,000 values do not become a matrix of 100 million.
    means = torch.stack(
        [values[torch.randint(count, (count,), generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measure(float(values.mean()), low, high, BOOTSTRAP)
