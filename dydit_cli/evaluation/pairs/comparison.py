"""Measure pairs, summarise them, and set them beside yardsticks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.evaluation.metrics.measure import Measure, bootstrapped_mean
from dydit_cli.evaluation.pairs.clip_score import ClipScore
from dydit_cli.evaluation.pairs.lpips import Lpips
from dydit_cli.evaluation.pairs.similarity import psnr, ssim
from dydit_cli.randomness import generator

PSNR, SSIM, LPIPS = "psnr", "ssim", "lpips"
CLIP, CLIP_AGAINST = "clip", "clip_against"
HIGHER_IS_NEARER = {PSNR: True, SSIM: True, LPIPS: False, CLIP: True, CLIP_AGAINST: True}


@dataclass(frozen=True)
class Summary:
    """One measure over all pairs.

    Attributes:
        mean: With its bootstrap interval over the pairs.
        median: Of the pairs.
        worst: Of the worst pair.
        best: Of the best.
    """

    mean: Measure
    median: float
    worst: float
    best: float


@dataclass(frozen=True)
class PairValues:
    """Values of every pair by measure, (N,) fp64 each."""

    values: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """Pairs."""
        return len(self.values[PSNR])

    def summaries(self) -> dict[str, Summary]:
        """Each measure over all pairs."""
        return {name: _summary(name, values) for name, values in self.values.items()}

    def from_worst_to_best(self) -> list[int]:
        """Indices of the pairs, by LPIPS where it was measured and by PSNR otherwise."""
        if LPIPS in self.values:
            return self.values[LPIPS].argsort(descending=True).tolist()
        return self.values[PSNR].argsort().tolist()


def measure_pairs(
    first: Tensor,
    second: Tensor,
    lpips: Lpips | None = None,
    clip: ClipScore | None = None,
    prompts: Sequence[str] | None = None,
) -> PairValues:
    """Compare image i of one set with image i of the other.

    Args:
        first: (N, H, W, C) or (N, F, H, W, C) bytes; a video's value is the mean over its frames.
        second: As many of the same size.
        lpips: Measure LPIPS with it.
        clip: Measure both sets against ``prompts`` with it.
        prompts: One an image or video.
    """
    frames = first.shape[1] if first.ndim == 5 else 1
    if first.ndim == 5:
        first, second = first.flatten(0, 1), second.flatten(0, 1)
    values = {PSNR: psnr(first, second), SSIM: ssim(first, second)}
    if lpips is not None:
        values[LPIPS] = lpips.distances(first, second)
    if clip is not None and prompts is not None:
        repeated = [prompt for prompt in prompts for _ in range(frames)]
        values[CLIP] = clip.scores(first, repeated)
        values[CLIP_AGAINST] = clip.scores(second, repeated)
    return PairValues({name: each.unflatten(0, (-1, frames)).mean(dim=1) for name, each in values.items()})


def _summary(name: str, values: Tensor) -> Summary:
    low, high = float(values.min()), float(values.max())
    worst, best = (low, high) if HIGHER_IS_NEARER[name] else (high, low)
    return Summary(
        bootstrapped_mean(values, generator(0, "pairs", name)),
        float(torch.quantile(values, 0.5)),
        worst,
        best,
    )
