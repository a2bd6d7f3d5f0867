"""The metrics against independent formulas, closed forms and repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dydit_cli.evaluation.metrics.frechet import frechet_distance, measure_frechet
from dydit_cli.evaluation.metrics.inception_score import SPLIT, measure_inception_score
from dydit_cli.evaluation.metrics.kernel import measure_kernel
from dydit_cli.evaluation.metrics.manifold import measure_precision_recall
from dydit_cli.evaluation.metrics.measure import bootstrapped_mean, from_influence, share
from dydit_cli.evaluation.metrics.moments import Moments, moments_of


def drawn(count: int, size: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(size)) / math.sqrt(size)
    return scale * torch.randn(count, size, generator=generator) @ mixing + 3 + shift


def newton_schulz_distance(first: Moments, second: Moments) -> float:
    """tr sqrtm(S1 S2) by the Denman-Beavers iteration: another algorithm, on the product itself, which is not symmetric."""
    y = (first.covariance @ second.covariance).numpy()
    z = np.eye(len(y))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    apart = (first.mean - second.mean).numpy()
    return float(apart @ apart + np.trace(first.covariance + second.covariance) - 2 * np.trace(y))


def test_moments_are_numpys() -> None:
    features = drawn(9000, 5, 0)
    found = moments_of(features)
    np.testing.assert_allclose(found.mean, features.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)
    assert found.count == 9000


def test_the_frechet_distance_is_the_reference_computations() -> None:
    first, second = (
        moments_of(drawn(400, 12, 1)),
        moments_of(drawn(500, 12, 2, scale=1.3, shift=0.2)),
    )
    assert frechet_distance(first, second) == pytest.approx(newton_schulz_distance(first, second), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=1e-9)


def test_the_frechet_distance_is_scipys() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = moments_of(drawn(100, 40, 1)), moments_of(drawn(120, 40, 2, scale=0.7))
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy())
    apart = (first.mean - second.mean).numpy()
    expected = apart @ apart + np.trace(first.covariance + second.covariance) - 2 * np.trace(root).real
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-8)


def test_the_frechet_distance_of_known_gaussians() -> None:
    """Commuting covariances: |Δm|² + Σ (√a − √b)²."""
    first = Moments(
        torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 4.0, 0.0])).double(), None
    )
    second = Moments(
        torch.tensor([0.0, 2.0, 1.0]).double(), torch.diag(torch.tensor([9.0, 4.0, 1.0])).double(), None
    )
    assert frechet_distance(first, second) == pytest.approx(5 + 4 + 0 + 1, rel=1e-12)


def test_fewer_samples_than_features_are_no_trouble() -> None:
    """Singular covariances, where a general square root of the product fails or needs an offset."""
    features = drawn(8, 20, 1)
    own, other = moments_of(features), moments_of(drawn(300, 20, 2))
    found = measure_frechet(features, own, other)
    assert found.value == pytest.approx(frechet_distance(own, other))
    assert found.value > 0
    # Eigenvalues of zero come out as rounding, some 1e-16, and their roots are summed.
    assert frechet_distance(own, own) == pytest.approx(0, abs=1e-6)
    assert found.low is not None
    assert math.isfinite(found.low)


def test_the_frechet_interval_is_as_wide_as_repeated_draws_scatter() -> None:
    reference = moments_of(drawn(20000, 6, 99, scale=1.2, shift=0.1))
    measured = [
        measure_frechet(features, moments_of(features), reference)
        for features in (drawn(600, 6, seed) for seed in range(60))
    ]
    scatter = float(np.std([each.value for each in measured], ddof=1))
    half = float(np.mean([each.half_width for each in measured]))
    assert half / 1.96 == pytest.approx(scatter, rel=0.3)


def test_clusters_widen_an_interval() -> None:
    """Frames that repeat say nothing new: the interval is that of the videos."""
    features = drawn(200, 4, 1)
    other = moments_of(drawn(2000, 4, 2, shift=0.3))
    once = measure_frechet(features, moments_of(features), other)
    repeated = features.repeat_interleave(5, dim=0)
    clusters = torch.arange(200).repeat_interleave(5)
    together = measure_frechet(repeated, moments_of(repeated), other, clusters)
    alone = measure_frechet(repeated, moments_of(repeated), other)
    assert once.half_width is not None
    assert together.half_width == pytest.approx(once.half_width, rel=0.01)
    assert alone.half_width == pytest.approx(once.half_width / math.sqrt(5), rel=0.02)


def test_the_kernel_distance_is_the_double_sum() -> None:
    x, y = drawn(23, 4, 1).double().numpy(), drawn(31, 4, 2, shift=0.5).double().numpy()

    def mean(first: np.ndarray, second: np.ndarray, skip: bool) -> float:
        terms = [
            (float(a @ b) / 4 + 1) ** 3
            for i, a in enumerate(first)
            for j, b in enumerate(second)
            if not (skip and i == j)
        ]
        return sum(terms) / len(terms)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    found = measure_kernel(torch.from_numpy(x).float(), torch.from_numpy(y).float())
    assert found.value == pytest.approx(expected, rel=1e-5)


def test_the_kernel_distance_of_one_distribution_is_about_zero_and_its_interval_true() -> None:
    reference = drawn(1500, 4, 99, shift=0.2)
    measured = [measure_kernel(drawn(200, 4, seed), reference) for seed in range(40)]
    scatter = float(np.std([each.value for each in measured], ddof=1))
    half = float(np.mean([each.half_width for each in measured]))
    assert half / 1.96 == pytest.approx(scatter, rel=0.35)


def test_the_inception_score_is_its_definition() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 2
    shares = torch.softmax(logits.double(), dim=1).numpy()
    mean = shares.mean(axis=0)
    expected = math.exp((shares * np.log(shares / mean)).sum(axis=1).mean())
    assert measure_inception_score(logits).value == pytest.approx(expected, rel=1e-10)


def test_the_inception_score_of_sure_and_even_classes_is_their_number() -> None:
    logits = torch.eye(7).repeat(10, 1) * 1e4
    assert measure_inception_score(logits).value == pytest.approx(7)
    assert measure_inception_score(torch.zeros(20, 7)).value == pytest.approx(1)


def test_the_inception_score_is_the_mean_over_parts_of_5000() -> None:
    logits = torch.randn(SPLIT + 1000, 4, generator=torch.Generator().manual_seed(0))
    parts = [measure_inception_score(part).value for part in logits.split(SPLIT)]
    assert measure_inception_score(logits).value == pytest.approx(sum(parts) / 2, rel=1e-10)


def brute_precision(samples: np.ndarray, reference: np.ndarray) -> float:
    """Kynkäänniemi et al., equations 1 and 2, point by point."""
    hits = 0
    radii = [sorted(float(np.linalg.norm(a - b)) for b in reference)[3] for a in reference]
    for sample in samples:
        hits += any(
            np.linalg.norm(sample - centre) <= radius for centre, radius in zip(reference, radii, strict=True)
        )
    return hits / len(samples)


def test_precision_and_recall_are_the_papers() -> None:
    samples, reference = drawn(60, 3, 1, scale=1.4), drawn(70, 3, 2)
    precision, recall = measure_precision_recall(samples, reference)
    x, y = samples.double().numpy(), reference.double().numpy()
    assert precision.value == pytest.approx(brute_precision(x, y))
    assert recall.value == pytest.approx(brute_precision(y, x))
    assert 0.2 < precision.value < 1
    for measure in (precision, recall):
        assert measure.low is not None
        assert measure.high is not None
        assert 0 <= measure.low <= measure.value <= measure.high <= 1


def test_far_samples_have_no_precision() -> None:
    precision, recall = measure_precision_recall(drawn(30, 3, 1, shift=100), drawn(30, 3, 2))
    assert precision.value == recall.value == 0


def test_wilsons_interval() -> None:
    """Values of Brown, Cai and DasGupta's formula, worked out by hand for 8 of 10."""
    found = share(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    assert share(5, 5).high == pytest.approx(1)
    assert share(0, 5).low == pytest.approx(0)


def test_the_delta_method_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    found = from_influence(float(values.mean()), values)
    assert found.half_width == pytest.approx(1.96 * float(values.std()) / math.sqrt(500), rel=1e-4)
    resampled = bootstrapped_mean(values, torch.Generator().manual_seed(0))
    assert resampled.half_width == pytest.approx(found.half_width, rel=0.1)
    assert from_influence(1.0, values[:1]).low is None
