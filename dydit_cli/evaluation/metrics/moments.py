"""Mean and covariance of features, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 8192
"""Features of so many images are cast to fp64 at a time."""


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs of a set of features.

    Attributes:
        mean: (D,) fp64.
        covariance: (D, D) fp64, unbiased.
        count: Of the features; None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    @property
    def size(self) -> int:
        """D."""
        return len(self.mean)


def moments_of(features: Tensor) -> Moments:
    """The moments of (N, D) features; N must be 2 at least.

    Two passes, the mean first: sums of squares would cancel where features lie far from zero.
    """
    count, size = features.shape
    mean = torch.zeros(size, dtype=torch.float64)
    for rows in features.split(ROWS):
        mean += rows.double().sum(dim=0)
    mean /= count
    scatter = torch.zeros(size, size, dtype=torch.float64)
    for rows in features.split(ROWS):
        centred = rows.double() - mean
        scatter.addmm_(centred.T, centred)
    return Moments(mean, scatter / (count - 1), count)
