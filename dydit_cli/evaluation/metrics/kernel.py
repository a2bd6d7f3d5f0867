"""The kernel distance (KID): unbiased squared maximum mean discrepancy with a cubic kernel.

Bińkowski et al., *Demystifying MMD GANs* (arXiv 1801.01401): k(x, y) = (x·y / D + 1)³. Other programs average the estimate over
random subsets of 1,000; here it is computed once from all pairs, which has the same expectation and less spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydit_cli.evaluation.metrics.measure import Measure, from_influence

BLOCK = 2048


def measure_kernel(features: Tensor, reference: Tensor, clusters: Tensor | None = None) -> Measure:
    """The squared distance, with the delta method's interval.

    Args:
        features: (N, D) of the samples.
        reference: (M, D) of the reference.
        clusters: See `from_influence`.
    """
    count, others = len(features), len(reference)
    own = _row_sums(features, features, skip_self=True)
    cross = _row_sums(features, reference)
    theirs = _row_sums(reference, reference, skip_self=True)
    value = (
        own.sum() / (count * (count - 1))
        + theirs.sum() / (others * (others - 1))
        - 2 * cross.sum() / (count * others)
    )
    influence = 2 * (own / (count - 1) - cross / others)
    return from_influence(float(value), influence, clusters)


def _row_sums(first: Tensor, second: Tensor, skip_self: bool = False) -> Tensor:
    """(N,) sums of k(x_i, y_j) over j, without j = i if asked."""
    size = first.shape[1]
    sums = torch.zeros(len(first), dtype=torch.float64)
    for start in range(0, len(first), BLOCK):
        rows = first[start : start + BLOCK].double()
        for columns in second.split(BLOCK):
            sums[start : start + len(rows)] += _kernel(rows @ columns.double().T, size).sum(dim=1)
        if skip_self:
            sums[start : start + len(rows)] -= _kernel(rows.square().sum(dim=1), size)
    return sums


def _kernel(products: Tensor, size: int) -> Tensor:
    shifted = products / size + 1
    return shifted * shifted * shifted
