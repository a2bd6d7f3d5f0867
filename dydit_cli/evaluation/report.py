"""What an evaluation found, and its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dydit_cli.evaluation.metrics.measure import Measure
from dydit_cli.evaluation.pairs.comparison import Summary

SCHEMA = 1
FILE = "evaluation.json"

ANOTHER_SEED, IN_BF16 = "another seed", "static in bfloat16"


@dataclass(frozen=True)
class PairsReport:
    """The comparison with a static model from the same seeds.

    Attributes:
        against: What it was compared with.
        count: Pairs.
        measures: By name.
        yardsticks: The same measures for pairs that show what a value means: the static model with another seed, and the static
            model computed in bfloat16.
        yardstick_count: Pairs of each yardstick.
        missing: Yardsticks that could not be measured, and why.
        worst: Indices of the worst pairs.
        median: Indices of the pairs around the median.
        files: Of the weights of LPIPS and CLIP: SHA-256.
    """

    against: dict[str, Any]
    count: int
    measures: dict[str, Summary]
    yardsticks: dict[str, dict[str, Summary]]
    yardstick_count: int
    missing: dict[str, str]
    worst: list[int]
    median: list[int]
    files: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What a model took.

    Attributes:
        parameters: All; those of the routers where they run.
        static_mmacs: Of a forward of the static model, by formula.
        mmacs: Of a forward as executed on the sampler's own trajectories, routers included, mean over the images.
        ratio: Executed share of attention and MLP MACs on the trajectories, with a bootstrap interval over the images.
        seconds_per_image: Wall time of sampling, decoding left out; the interval is a bootstrap over batches.
    """

    parameters: int
    static_mmacs: float
    mmacs: float
    ratio: Measure
    seconds_per_image: Measure | None


@dataclass(frozen=True)
class EvaluationReport:
    """Everything about one evaluation.

    Attributes:
        name: Of the subject, for tables.
        subject: What was evaluated: kind, path, number, seed, steps, guidance, sampler, weights.
        images: Images, or frames of all videos.
        videos: Videos; None for images.
        reference: What the distances are to; None without one.
        extractor: The network, with its hash; None without one.
        metrics: By name.
        missing: Metrics that were not measured, and why.
        pairs: The comparison from the same seeds.
        cost: Of a model.
        notes: What a reader must know.
        device: In words.
        versions: Of Python and packages.
        seconds: Of everything.
        files: Written beside the report.
    """

    name: str
    subject: dict[str, Any]
    images: int
    videos: int | None
    reference: dict[str, Any] | None
    extractor: dict[str, Any] | None
    metrics: dict[str, Measure]
    missing: dict[str, str]
    pairs: PairsReport | None
    cost: Cost | None
    notes: list[str]
    device: str
    versions: dict[str, str]
    seconds: float
    files: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it: what is not finite becomes null."""
        content: dict[str, Any] = _finite({"schema": SCHEMA, **asdict(self)})
        return content

    def values(self) -> dict[str, float]:
        """Values by the keys of conditions."""
        found = {name: measure.value for name, measure in self.metrics.items()}
        if self.cost is not None:
            found["ratio"] = self.cost.ratio.value
        if self.pairs is not None:
            for name, summary in self.pairs.measures.items():
                found[f"{name}.mean"] = summary.mean.value
                found |= {f"{name}.{part}": getattr(summary, part) for part in ("median", "worst", "best")}
        return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
