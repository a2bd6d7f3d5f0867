"""The Fréchet distance between two Gaussians, without a general matrix square root.

Heusel et al., *GANs Trained by a Two Time-Scale Update Rule* (arXiv 1706.08500), use tr sqrtm(S1 S2). The product of two
covariances is similar to the symmetric positive semidefinite A S1 A with A = S2^(1/2), so that two symmetric eigenvalue
problems give the trace, with real numbers throughout and without adding anything to a diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.evaluation.metrics.measure import Measure, from_influence
from dydit_cli.evaluation.metrics.moments import ROWS, Moments

SINGULAR = 1e-10
"""Eigenvalues below this share of the largest are rounding; they count in no inverse."""


@dataclass(frozen=True)
class _Coupling:
    """A = S2^(1/2) and the eigenvalues and eigenvectors of A S1 A."""

    root: Tensor
    values: Tensor
    vectors: Tensor

    @property
    def trace(self) -> float:
        """tr (A S1 A)^(1/2)."""
        return float(self.values.sqrt().sum())


def _coupling(first: Moments, second: Moments) -> _Coupling:
    values, vectors = torch.linalg.eigh(second.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ first.covariance @ root
    values, vectors = torch.linalg.eigh((product + product.T) / 2)
    return _Coupling(root, values.clamp(min=0), vectors)


def _distance(first: Moments, second: Moments, coupling: _Coupling) -> float:
    difference = first.mean - second.mean
    traces = torch.trace(first.covariance) + torch.trace(second.covariance)
    # A distance is not negative; between a set and itself, roots of rounding would make it so.
    return max(0.0, float(difference @ difference + traces) - 2 * coupling.trace)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 − m2|² + tr(S1 + S2 − 2 (S1 S2)^(1/2))."""
    return _distance(first, second, _coupling(first, second))


def measure_frechet(
    features: Tensor, own: Moments, reference: Moments, clusters: Tensor | None = None
) -> Measure:
    """The distance of samples to a reference, with the delta method's interval.

    The derivative with respect to S1 is I − A (A S1 A)^(−1/2) A, so that a sample x moves the distance by
    2 (m1 − m2)·(x − m1) + (x − m1)ᵀ G (x − m1) − tr(G S1): no resampling, at any number of features.

    Args:
        features: (N, D) of the samples.
        own: Their moments.
        reference: Of what they are compared with.
        clusters: See `from_influence`.
    """
    coupling = _coupling(own, reference)
    kept = coupling.values > SINGULAR * coupling.values.max()
    inverse_root = torch.where(kept, coupling.values.clamp(min=1e-300).rsqrt(), 0.0)
    middle = (coupling.vectors * inverse_root) @ coupling.vectors.T
    gradient = torch.eye(own.size, dtype=torch.float64) - coupling.root @ middle @ coupling.root
    direction = 2 * (own.mean - reference.mean)
    influence = []
    for rows in features.split(ROWS):
        centred = rows.double() - own.mean
        influence.append(centred @ direction + ((centred @ gradient) * centred).sum(dim=1))
    return from_influence(_distance(own, reference, coupling), torch.cat(influence), clusters)
