"""All metrics of one set of samples, and for each that cannot be measured the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dydit_cli.evaluation.collecting import Collected
from dydit_cli.evaluation.extractors.extractor import Extractor
from dydit_cli.evaluation.metrics.frechet import measure_frechet
from dydit_cli.evaluation.metrics.inception_score import measure_inception_score
from dydit_cli.evaluation.metrics.kernel import measure_kernel
from dydit_cli.evaluation.metrics.manifold import NEIGHBOURS, measure_precision_recall
from dydit_cli.evaluation.metrics.measure import Measure, from_influence, share
from dydit_cli.evaluation.metrics.moments import moments_of
from dydit_cli.evaluation.reference import Reference

FRECHET, SPATIAL, KERNEL = "frechet", "spatial_frechet", "kernel"
SCORE, PRECISION, RECALL, ACCURACY, TEMPORAL = (
    "inception_score",
    "precision",
    "recall",
    "accuracy",
    "temporal_frechet",
)
METRICS = (FRECHET, SPATIAL, KERNEL, SCORE, PRECISION, RECALL, ACCURACY, TEMPORAL)

NO_REFERENCE = "no --reference was given"
NO_FEATURES = "the reference is statistics without images"


@dataclass(frozen=True)
class Scores:
    """Values by metric, and the reasons for those that are missing."""

    values: dict[str, Measure] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def score(found: Collected, extractor: Extractor, reference: Reference | None) -> Scores:
    """Measure whatever can be.

    Args:
        found: A pass over at least two samples.
        extractor: The network that was used.
        reference: What to compare with.
    """
    features, clusters = found.features, found.clusters
    if features is None:
        raise TypeError("a pass without features has no scores")
    scores = Scores()
    values, missing = scores.values, scores.missing
    values[SCORE] = measure_inception_score(features.logits, clusters)
    if reference is None:
        missing |= dict.fromkeys((FRECHET, SPATIAL, KERNEL, PRECISION, RECALL), NO_REFERENCE)
    else:
        values[FRECHET] = measure_frechet(
            features.pooled, moments_of(features.pooled), reference.pooled, clusters
        )
        if reference.spatial is None:
            missing[SPATIAL] = "the reference's file has no mu_s and sigma_s"
        else:
            values[SPATIAL] = measure_frechet(
                features.spatial, moments_of(features.spatial), reference.spatial, clusters
            )
        _score_against_images(found, reference, scores)
        _score_time(found, reference, scores)
    _score_accuracy(found, extractor, scores)
    return scores


def _score_against_images(found: Collected, reference: Reference, scores: Scores) -> None:
    if found.features is None or reference.features is None:
        scores.missing.update(dict.fromkeys((KERNEL, PRECISION, RECALL), NO_FEATURES))
        return
    own, theirs = found.features.pooled, reference.features.pooled
    scores.values[KERNEL] = measure_kernel(own, theirs, found.clusters)
    if min(len(own), len(theirs)) <= NEIGHBOURS:
        scores.missing.update(dict.fromkeys((PRECISION, RECALL), f"they need more than {NEIGHBOURS} images"))
        return
    scores.values[PRECISION], scores.values[RECALL] = measure_precision_recall(own, theirs, found.clusters)


def _score_time(found: Collected, reference: Reference, scores: Scores) -> None:
    """The Fréchet distance between feature differences of consecutive frames (ours), for videos alone."""
    if found.frames is None:
        return
    steps = found.steps_between_frames
    if steps is None or reference.temporal is None:
        scores.missing[TEMPORAL] = (
            "the videos have one frame" if steps is None else "the reference has no consecutive frames"
        )
        return
    rows = steps.flatten(0, 1)
    clusters = torch.arange(found.count).repeat_interleave(steps.shape[1])
    scores.values[TEMPORAL] = measure_frechet(rows, moments_of(rows), reference.temporal, clusters)


def _score_accuracy(found: Collected, extractor: Extractor, scores: Scores) -> None:
    if found.features is None or extractor.classes is None:
        scores.missing[ACCURACY] = "the network's classes are not those of the data"
        return
    if found.labels is None or len(found.labels) != found.count:
        scores.missing[ACCURACY] = "the classes of the samples are not known"
        return
    if not all(0 <= label < extractor.classes for label in found.labels):
        scores.missing[ACCURACY] = "the samples have classes that the network does not know"
        return
    labels = torch.tensor(found.labels).repeat_interleave(found.frames or 1)
    right = found.features.logits.argmax(dim=1) == labels
    if found.clusters is None:
        scores.values[ACCURACY] = share(int(right.sum()), len(right))
    else:
        scores.values[ACCURACY] = from_influence(float(right.double().mean()), right.double(), found.clusters)
