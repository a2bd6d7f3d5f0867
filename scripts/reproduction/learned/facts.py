"""What the decisions say, in numbers and in the words that follow from them; no number is typed by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scripts.reproduction.learned.decisions import Decisions

CLEAR = 0.5
"""Least size of a rank correlation that is called a trend (ours)."""
NEARLY_NONE = 0.01
"""Share of tokens below which an MLP is called skipped."""
FEW_POINTS = 0.05
"""Least difference of keep rates that is called one (ours)."""


@dataclass(frozen=True)
class Facts:
    """Of one model.

    Attributes:
        correlations: Spearman's, of the noise level with the mean over blocks of ``width``, ``heads``, ``groups``, ``tokens`` and
            ``macs``; None for what is the same at all levels.
        block_trends: Blocks whose width falls, rises, or does neither, with noise.
        noisy, clean: Mean ``width``, ``heads``, ``groups``, ``tokens`` and ``macs`` over the noisiest and the cleanest third of the
            levels.
        noise_third: Mean noise in the noisiest, middle and cleanest third.
        regions: Keep rates on garment, edge and background in these thirds, (3, 3).
        narrowest: Share of (level, block) pairs where no unit is on but those that always are.
        no_tokens: Share of pairs where the MLP sees (almost) no token.
        skipped: Share of pairs where both hold.
        always_skipped: Numbers of blocks, from 0, that are so at every level.
        ever_skipped: Those that are so at some level.
        spread: Largest difference between the widths of two blocks at one level.
    """

    correlations: dict[str, float | None]
    block_trends: tuple[int, int, int]
    noisy: dict[str, float]
    clean: dict[str, float]
    noise_third: tuple[float, float, float]
    regions: np.ndarray
    narrowest: float
    no_tokens: float
    skipped: float
    always_skipped: tuple[int, ...]
    ever_skipped: tuple[int, ...]
    spread: float


KINDS = ("width", "heads", "groups", "tokens", "macs")


def facts_of(found: Decisions) -> Facts:
    """Sum up the decisions of a model."""
    thirds = np.array_split(np.arange(len(found.noise)), 3)
    values = {kind: getattr(found, kind) for kind in KINDS}
    none = found.tokens < NEARLY_NONE
    skipped = found.narrowest & none
    by_block = [spearman(found.noise, column) for column in found.width.T]
    falling = sum(value is not None and value <= -CLEAR for value in by_block)
    rising = sum(value is not None and value >= CLEAR for value in by_block)
    return Facts(
        correlations={kind: spearman(found.noise, value.mean(axis=1)) for kind, value in values.items()},
        block_trends=(falling, rising, len(by_block) - falling - rising),
        noisy={kind: float(value[thirds[0]].mean()) for kind, value in values.items()},
        clean={kind: float(value[thirds[-1]].mean()) for kind, value in values.items()},
        noise_third=(
            _mean(found.noise, thirds[0]),
            _mean(found.noise, thirds[1]),
            _mean(found.noise, thirds[2]),
        ),
        regions=np.stack([found.regions[third].mean(axis=0) for third in thirds]),
        narrowest=float(found.narrowest.mean()),
        no_tokens=float(none.mean()),
        skipped=float(skipped.mean()),
        always_skipped=tuple(np.flatnonzero(skipped.all(axis=0)).tolist()),
        ever_skipped=tuple(np.flatnonzero(skipped.any(axis=0)).tolist()),
        spread=float((found.width.max(axis=1) - found.width.min(axis=1)).max()),
    )


def _mean(values: np.ndarray, places: np.ndarray) -> float:
    return float(values[places].mean())


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation, ties given their mean rank; None where one of the two never changes."""
    if np.ptp(first) == 0 or np.ptp(second) < 1e-9:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    # What differs by rounding alone is a tie.
    _, inverse, counts = np.unique(values.round(9), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def trend(correlation: float | None) -> str:
    """A rank correlation of noise with width, in words."""
    if correlation is None:
        return "the same at all noise levels"
    if correlation <= -CLEAR:
        return "narrower with more noise, as in the paper"
    if correlation >= CLEAR:
        return "wider with more noise, the opposite of the paper"
    return "no clear trend"


def preference(garment: float, background: float) -> str:
    """Two keep rates, in words."""
    if abs(garment - background) < FEW_POINTS:
        return "kept about alike"
    return "garment kept more" if garment > background else "background kept more"
