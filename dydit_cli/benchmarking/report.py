"""What a benchmark found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dydit_cli.profiling.timing import PairedRatio, paired_ratio


@dataclass(frozen=True)
class Accelerated:
    """Compact against static execution, both compiled or both as CUDA graphs.

    Attributes:
        static_ms, compact_ms: Medians.
        time_ratio: Median of the rounds' ratios.
        interval: Its 95 % bootstrap interval.
        efficiency: Ideal / time ratio.
    """

    static_ms: float
    compact_ms: float
    time_ratio: float
    interval: tuple[float, float]
    efficiency: float


@dataclass(frozen=True)
class Row:
    """One batch size and one set of masks.

    Attributes:
        case: In words.
        batch: Images.
        steps: Of a sampling run; None for forwards.
        heads, groups, tokens: Shares that were on, means over blocks, images and noise levels; None for sampling runs.
        ratio: Attention and MLP MACs executed / static.
        ideal: All MACs executed / static, embeddings, modulation and routers included: what time would be if it followed arithmetic.
        time_ratio: Compact / static, the median of the rounds' ratios.
        interval: Its 95 % bootstrap interval.
        efficiency: Ideal / time ratio: the share of the promised speed-up that is delivered.
        static: Which static model was the faster and is the baseline: ``dydit`` or ``diffusers``.
        static_ms: Its median; of a forward of the batch, or of a whole sampling run of it.
        compact_ms, dense_ms, dydit_static_ms, diffusers_static_ms: Medians of the others; None where not measured.
        dense_ratio: Dense / static.
        compiled: Compiled against compiled, or None.
        graphed: CUDA graphs against CUDA graphs, or None.
        difference_to_dense: Largest difference of compact to dense execution of the same masks, in units of the largest value;
            None for sampling runs.
        pairs: Rounds.
    """

    case: str
    batch: int
    steps: int | None
    heads: float | None
    groups: float | None
    tokens: float | None
    ratio: float
    ideal: float
    time_ratio: float
    interval: tuple[float, float]
    efficiency: float
    static: str
    static_ms: float
    compact_ms: float
    dydit_static_ms: float
    diffusers_static_ms: float | None
    dense_ms: float | None
    dense_ratio: float | None
    compiled: Accelerated | None
    graphed: Accelerated | None
    difference_to_dense: float | None
    pairs: int


@dataclass(frozen=True)
class BenchReport:
    """All rows, and what they were measured on.

    Attributes:
        rows: See `Row`.
        title: The model in words. note: Where its masks and inputs come from.
        model: Its size.
        clock: ``cpu`` or ``wall``. threads: Of torch. device: In words. dtype: Of weights and activations.
        versions: Of Python and packages.
        settings: As asked.
    """

    rows: list[Row]
    title: str
    note: str
    model: dict[str, Any]
    clock: str
    threads: int
    device: str
    dtype: str
    versions: dict[str, str]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


STATICS = {"static": "dydit", "diffusers": "diffusers"}


def row_of(
    seconds: Mapping[str, Sequence[float]],
    *,
    ideal: float,
    forwards: int = 1,
    seed: int = 0,
    **facts: Any,
) -> Row:
    """Turn the seconds of each round into a row.

    Args:
        seconds: By side: ``static`` and ``compact``, and where measured ``diffusers``, ``dense``, ``compiled_static`` and
            ``compiled``, ``graphed_static`` and ``graphed``.
        ideal: Of the row.
        forwards: Forwards of a round, over which times are averaged.
        seed: Of the resampling.
        facts: The other fields that do not follow from the times.
    """
    medians = {name: _median(values) / forwards * 1000 for name, values in seconds.items()}
    baseline = min((name for name in STATICS if name in seconds), key=lambda name: medians[name])
    found = paired_ratio(seconds["compact"], seconds[baseline], seed)
    dense = paired_ratio(seconds["dense"], seconds[baseline], seed).ratio if "dense" in seconds else None
    return Row(
        ideal=ideal,
        **_ratio_fields(found, ideal),
        static=STATICS[baseline],
        static_ms=medians[baseline],
        compact_ms=medians["compact"],
        dydit_static_ms=medians["static"],
        diffusers_static_ms=medians.get("diffusers"),
        dense_ms=medians.get("dense"),
        dense_ratio=dense,
        compiled=_accelerated("compiled", seconds, medians, ideal, seed),
        graphed=_accelerated("graphed", seconds, medians, ideal, seed),
        pairs=found.pairs,
        **facts,
    )


def _accelerated(
    name: str, seconds: Mapping[str, Sequence[float]], medians: Mapping[str, float], ideal: float, seed: int
) -> Accelerated | None:
    if name not in seconds:
        return None
    found = paired_ratio(seconds[name], seconds[f"{name}_static"], seed)
    return Accelerated(
        static_ms=medians[f"{name}_static"], compact_ms=medians[name], **_ratio_fields(found, ideal)
    )


def _ratio_fields(found: PairedRatio, ideal: float) -> dict[str, Any]:
    return {
        "time_ratio": found.ratio,
        "interval": (found.low, found.high),
        "efficiency": ideal / found.ratio,
    }


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
