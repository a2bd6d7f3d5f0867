"""Open the other side of the pairs, make its images, and measure both yardsticks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.evaluation.collecting import Collected, Progress, collect, refuse_mismatch
from dydit_cli.evaluation.inputs.kinds import is_model
from dydit_cli.evaluation.inputs.model import ModelImages, SamplingSettings, open_model
from dydit_cli.evaluation.inputs.opening import open_source
from dydit_cli.evaluation.inputs.source import ImageSource
from dydit_cli.evaluation.pairs.clip_score import ClipScore, open_clip, read_prompts
from dydit_cli.evaluation.pairs.comparison import PairValues, Summary, measure_pairs
from dydit_cli.evaluation.pairs.lpips import Lpips, open_lpips
from dydit_cli.evaluation.pairs.sheets import PAIRS
from dydit_cli.evaluation.report import ANOTHER_SEED, IN_BF16, PairsReport
from dydit_cli.evaluation.settings import EvaluationSettings
from dydit_cli.processes.world import ALONE, World

SELF = "static"
"""`--against static`: the subject's own weights with everything on."""


@dataclass(frozen=True)
class Against:
    """The other side, and what to measure pairs with.

    Attributes:
        name: For sheets.
        source: Its images.
        sampling: How it is asked, where it is a model.
        yardstick_images: See `EvaluationSettings`.
    """

    name: str
    source: ImageSource
    sampling: SamplingSettings
    yardstick_images: int
    lpips: Lpips | None
    clip: ClipScore | None
    prompts: list[str] | None

    @classmethod
    def opened(cls, settings: EvaluationSettings, subject: ImageSource, device: torch.device) -> Against:
        """Open what `EvaluationSettings.against` names.

        A model runs complete, in fp32, with the subject's seed, classes, sampler, steps and guidance.

        Raises:
            DyditError: If it, or weights of LPIPS or CLIP, are not there.
        """
        named = str(settings.against)
        own = named == SELF and isinstance(subject, ModelImages)
        path = subject.path if own and isinstance(subject, ModelImages) else Path(named).expanduser()
        sampling = replace(settings.sampling, execution="static", keep_bias=0.0, budget=None, dtype="float32")
        if isinstance(subject, ModelImages):
            sampling = replace(sampling, classes=subject.classes, sampler=subject.sampler)
        elif is_model(path):
            sampling = _as_the_samples(sampling, subject)
        source = open_source(path, sampling, limit=settings.limit, videos=settings.videos)
        prompts = None
        if settings.clip is not None and settings.prompts is not None:
            prompts = read_prompts(Path(settings.prompts).expanduser(), subject.labels, len(subject))
        return cls(
            f"{path.name}, static" if isinstance(source, ModelImages) else path.name,
            source,
            sampling,
            settings.yardstick_images,
            open_lpips(Path(settings.lpips).expanduser(), device) if settings.lpips is not None else None,
            open_clip(Path(settings.clip).expanduser(), device) if settings.clip is not None else None,
            prompts,
        )


def _as_the_samples(sampling: SamplingSettings, subject: ImageSource) -> SamplingSettings:
    """The settings that samples on disk were made with, as their manifest has them."""
    made = subject.describe().get("made_by") or {}
    known: dict[str, Any] = {
        key: made[key] for key in ("seed", "steps", "guidance", "sampler") if made.get(key) is not None
    }
    return replace(sampling, num_images=len(subject), classes=subject.labels, **known)


@dataclass(frozen=True)
class Compared:
    """A report, and what sheets are drawn from.

    Attributes:
        report: See `PairsReport`.
        images: Of the other side.
        values: Of every pair.
    """

    report: PairsReport
    images: Tensor
    values: Mapping[str, Tensor]


def compare_with(against: Against, found: Collected, on_progress: Progress, world: World = ALONE) -> Compared:
    """Measure the pairs and the yardsticks; several processes share the sampling.

    Raises:
        DyditError: If the two sides do not pair.
    """
    other = collect(
        against.source,
        None,
        keep_images=True,
        what="static images",
        on_progress=on_progress,
        world=world,
    )
    refuse_mismatch(found, other)
    if found.images is None or other.images is None:
        raise TypeError("images were not kept")
    pairs = measure_pairs(found.images, other.images, against.lpips, against.clip, against.prompts)
    yardsticks, missing, count = _yardsticks(against, other.images, on_progress, world)
    order = pairs.from_worst_to_best()
    middle = max(0, (len(order) - PAIRS) // 2)
    report = PairsReport(
        against=against.source.describe(),
        count=pairs.count,
        measures=pairs.summaries(),
        yardsticks=yardsticks,
        yardstick_count=count,
        missing=missing,
        worst=order[:PAIRS],
        median=order[middle : middle + PAIRS],
        files={
            "lpips_sha256": None if against.lpips is None else list(against.lpips.sha256),
            "clip_sha256": None if against.clip is None else against.clip.sha256,
        },
    )
    return Compared(report, other.images, pairs.values)


def _yardsticks(
    against: Against, images: Tensor, on_progress: Progress, world: World
) -> tuple[dict[str, dict[str, Summary]], dict[str, str], int]:
    """Another seed of the static model: what unrelated pictures score. The static model in bf16: what rounding alone does."""
    names = (ANOTHER_SEED, IN_BF16)
    if not isinstance(against.source, ModelImages):
        why = "the other side is images; its model would have to make more"
        return {}, dict.fromkeys(names, why), 0
    count = min(len(images), against.yardstick_images)
    if count == 0:
        return {}, dict.fromkeys(names, "not asked for (yardstick_images=0)"), 0
    base = replace(against.sampling, num_images=count)
    changed = {
        ANOTHER_SEED: replace(base, seed=base.seed + 1),
        IN_BF16: replace(base, dtype="bfloat16"),
    }
    found: dict[str, dict[str, Summary]] = {}
    for name, sampling in changed.items():
        source = open_model(against.source.path, sampling)
        made = collect(source, None, keep_images=True, what=name, on_progress=on_progress, world=world)
        if made.images is None:
            raise TypeError("images were not kept")
        found[name] = PairValues(measure_pairs(made.images, images[:count], against.lpips).values).summaries()
    return found, {}, count
