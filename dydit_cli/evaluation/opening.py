"""Open what an evaluation needs, all of it checked, before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.collecting import Progress
from dydit_cli.evaluation.conditions import Condition, read_condition
from dydit_cli.evaluation.extractors.choosing import open_extractor
from dydit_cli.evaluation.extractors.extractor import Extractor
from dydit_cli.evaluation.extractors.fashion import NAME as FASHION
from dydit_cli.evaluation.inputs.model import ModelImages
from dydit_cli.evaluation.inputs.opening import open_source
from dydit_cli.evaluation.inputs.source import ImageSource
from dydit_cli.evaluation.pairs.against import Against
from dydit_cli.evaluation.settings import AUTO, EvaluationSettings
from dydit_cli.processes.world import World, join


@dataclass(frozen=True)
class OpenedEvaluation:
    """What is there.

    Attributes:
        path: Of what is evaluated.
        settings: With this process's own device.
        conditions: Under which the run fails.
        world: Processes that share the work. device: Of this one.
        source: What is evaluated. against: The other side of the pairs, if there is one.
        extractor: The network, or None; `without_extractor` then says why there is none.
        reference: What distances are to, not opened yet; None if there is nothing.
    """

    path: Path
    settings: EvaluationSettings
    conditions: tuple[Condition, ...]
    world: World
    device: torch.device
    source: ImageSource
    against: Against | None
    extractor: Extractor | None
    without_extractor: str
    reference: str | None


def open_evaluation(
    subject: str | Path,
    settings: EvaluationSettings,
    *,
    out: str | Path | None,
    overwrite: bool,
    on_progress: Progress = lambda what, done, total: None,
) -> OpenedEvaluation:
    """Open all but the reference, whose images may take a while. The arguments are those of `evaluate`.

    Raises:
        DyditError: For what cannot be.
    """
    conditions = tuple(read_condition(text) for text in settings.fail_if)
    _check(settings, conditions, out)
    if out is not None:
        refuse_existing(Path(out), overwrite)
    world = join(settings.processes, settings.sampling.device)
    path, device = Path(subject).expanduser(), world.device(settings.sampling.device)
    if world.size > 1:
        # Each process's own.
        settings = replace(settings, sampling=replace(settings.sampling, device=str(device)))
    progress = _sampling(on_progress, settings, "images")
    source = open_source(path, settings.sampling, progress, settings.limit, settings.videos)
    against = Against.opened(settings, source, device) if settings.against is not None else None
    extractor, reason = _extractor(settings, source, device)
    reference = settings.reference or (
        FASHION if extractor is not None and extractor.name == FASHION else None
    )
    return OpenedEvaluation(
        path, settings, conditions, world, device, source, against, extractor, reason, reference
    )


def _check(settings: EvaluationSettings, conditions: Sequence[Condition], out: str | Path | None) -> None:
    if settings.clip is not None and settings.prompts is None:
        raise DyditError(
            "A CLIP score needs prompts.",
            why="It compares images with the texts they were made from.",
            fix="Pass --prompts FILE, a line for each class or image.",
        )
    paired = {name for name in ("lpips", "clip") if getattr(settings, name) is not None}
    if paired and settings.against is None:
        raise DyditError(
            f"--{min(paired)} is given without --against.",
            why="LPIPS and CLIP scores are measured on pairs.",
            fix="Pass --against STATIC as well, or leave it out.",
        )
    pairwise = [condition for condition in conditions if "." in condition.key]
    if pairwise and settings.against is None:
        raise DyditError(
            f"The condition '{pairwise[0].text}' needs pairs.",
            why="No --against is given, so that nothing is compared pair by pair.",
            fix="Pass --against STATIC, a static model or its images from the same seeds.",
        )
    optional = {"lpips": settings.lpips, "clip": settings.clip, "clip_against": settings.clip}
    for condition in conditions:
        name = condition.key.partition(".")[0]
        if name in optional and optional[name] is None:
            option = f"--{name.partition('_')[0]}"
            raise DyditError(
                f"The condition '{condition.text}' cannot be judged.",
                why=f"It is measured with weights of yours, and no {option} is given.",
                fix=f"Pass {option} FOLDER as well.",
            )
    if settings.statistics and out is None:
        raise DyditError(
            "The statistics have nowhere to go.",
            why="They are written into the folder of the evaluation.",
            fix="Pass --out FOLDER.",
        )


def _extractor(
    settings: EvaluationSettings, source: ImageSource, device: torch.device
) -> tuple[Extractor | None, str]:
    """The network, or None and why there is none; only pairs can be measured then."""
    if settings.extractor != AUTO:
        return open_extractor(settings.extractor, settings.resize, device), ""
    extractor = open_extractor(FASHION, settings.resize, device)
    try:
        _probe(source, extractor)
    except DyditError:
        if settings.against is None:
            raise
        return None, "no --extractor was given, and the Fashion-MNIST network cannot judge these images"
    return extractor, ""


def _probe(source: ImageSource, extractor: Extractor) -> None:
    """Ask the network for the first image, without sampling a model for it.

    Raises:
        DyditError: If it cannot take it.
    """
    if isinstance(source, ModelImages):
        geometry = source.model.geometry
        grey = source.decoder is None and geometry.in_channels == 1
        shape = (1, geometry.sample_size, geometry.sample_size, 1 if grey else 3)
        image = torch.zeros(shape, dtype=torch.uint8)
        # What a model with three channels makes is taken to have colours.
        image[..., 0] = 0 if grey else 1
        extractor.features(image)
        return
    first = next(source.batches(1)).images
    extractor.features(first.flatten(0, 1)[:1] if first.ndim == 5 else first)


def _sampling(on_progress: Progress, settings: EvaluationSettings, what: str) -> Callable[[float], None]:
    """Progress of a model's own steps, which come many to a batch."""
    return lambda done: on_progress(what, done, settings.sampling.num_images)
