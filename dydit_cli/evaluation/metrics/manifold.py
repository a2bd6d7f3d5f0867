"""Precision and recall by nearest-neighbour balls (Kynkäänniemi et al., arXiv 1904.06991), k = 3 as in ADM's evaluation.

Precision is the share of samples inside the reference's balls, recall the share of the reference inside the samples'. Both
depend on the numbers of images, and recall cannot be high with few samples: compare runs of one size only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dydit_cli.evaluation.metrics.measure import JACKKNIFE, Measure, Z, share
from dydit_cli.randomness import generator

NEIGHBOURS = 3
GROUPS = 10
ROWS = 1024
"""Distances of so many points to all others are in memory at a time."""


def measure_precision_recall(
    features: Tensor, reference: Tensor, clusters: Tensor | None = None
) -> tuple[Measure, Measure]:
    """Precision with Wilson's interval (a jackknife over whole clusters where there are any), recall with a jackknife's.

    The samples' balls change with the samples, so that recall has no binomial interval; ten groups are left out in turn.

    Args:
        features: (N, D) of the samples, N > 3.
        reference: (M, D), M > 3.
        clusters: (N,) samples that belong together are left out together.
    """
    inside = _inside(features, reference, _radii(reference))
    precision = share(int(inside.sum()), len(inside))
    groups = _groups(torch.arange(len(features)) if clusters is None else clusters)
    if clusters is not None:
        left_out = [float(inside[groups != group].double().mean()) for group in groups.unique().tolist()]
        precision = _jackknifed(precision.value, left_out)
    recall = _recall(features, reference)
    kept = [features[groups != group] for group in groups.unique().tolist()]
    if min(len(part) for part in kept) <= NEIGHBOURS:
        return precision, Measure(recall)
    return precision, _jackknifed(recall, [_recall(part, reference) for part in kept])


def _groups(clusters: Tensor) -> Tensor:
    """(N,) the group of each sample, by chance: samples often come class by class, or with their classes in turn."""
    count = int(clusters.max()) + 1
    return (torch.randperm(count, generator=generator(0, "jackknife")) % GROUPS)[clusters]


def _recall(features: Tensor, reference: Tensor) -> float:
    return float(_inside(reference, features, _radii(features)).double().mean())


def _jackknifed(value: float, left_out: list[float]) -> Measure:
    count = len(left_out)
    mean = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((each - mean) ** 2 for each in left_out))
    return Measure(value, max(0.0, value - Z * error), min(1.0, value + Z * error), JACKKNIFE)


def _radii(points: Tensor) -> Tensor:
    """(N,) squared distance of each point to its third neighbour, itself left out."""
    radii = []
    for start in range(0, len(points), ROWS):
        squares = _squared_distances(points[start : start + ROWS], points)
        rows = torch.arange(len(squares))
        squares[rows, start + rows] = -1.0
        radii.append(squares.topk(NEIGHBOURS + 1, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """(N,) whether a point lies in the ball of any centre."""
    return torch.cat([(_squared_distances(rows, centres) <= radii).any(dim=1) for rows in points.split(ROWS)])


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) squared distances in fp64."""
    first, second = first.double(), second.double()
    products = first @ second.T
    return (first.square().sum(dim=1)[:, None] + second.square().sum(dim=1) - 2 * products).clamp_(min=0)
