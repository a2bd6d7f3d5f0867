"""The inception score: exp of the mean divergence of a sample's classes from all samples' (Salimans et al., arXiv 1606.03498)."""

from __future__ import annotations

import torch
from torch import Tensor

from dydit_cli.evaluation.metrics.measure import Measure, from_influence

SPLIT = 5000
"""Samples of a part; the score is the mean over the parts, as in OpenAI's ADM evaluation."""


def measure_inception_score(logits: Tensor, clusters: Tensor | None = None) -> Measure:
    """The score of (N, K) logits, in the order of the samples, with the delta method's interval."""
    scores, influence = [], []
    for part in logits.split(SPLIT):
        logs = part.double().log_softmax(dim=1)
        shares = logs.exp()
        # From the logarithms: a class that no sample shows has a mean of zero, and 0 · log 0 is 0.
        mean_logs = torch.logsumexp(logs, dim=0) - torch.tensor(float(len(part)), dtype=torch.float64).log()
        divergences = (shares * (logs - mean_logs)).sum(dim=1)
        score = divergences.mean().exp()
        scores.append(score)
        influence.append(score * (divergences - divergences.mean()))
    # Parts weigh alike whatever their size, as they do in ADM's program.
    sizes = [len(part) for part in influence]
    weights = [len(logits) / (len(sizes) * size) for size in sizes]
    weighted = torch.cat([weight * part for weight, part in zip(weights, influence, strict=True)])
    return from_influence(float(torch.stack(scores).mean()), weighted, clusters)
