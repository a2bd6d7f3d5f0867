"""One evaluation: from a model, a folder or an archive to a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import artifact_folder, write_json, write_manifest
from dydit_cli.artifacts.manifest import device_description, versions
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.collecting import Collected, Progress, collect
from dydit_cli.evaluation.conditions import Condition
from dydit_cli.evaluation.extractors.extractor import Extractor
from dydit_cli.evaluation.inputs.model import ModelImages, executed_mmacs
from dydit_cli.evaluation.inputs.source import ImageSource
from dydit_cli.evaluation.metrics.measure import Measure, bootstrapped_mean
from dydit_cli.evaluation.opening import open_evaluation
from dydit_cli.evaluation.pairs.against import compare_with
from dydit_cli.evaluation.pairs.sheets import write_sheet
from dydit_cli.evaluation.reference import Reference, open_reference, write_statistics
from dydit_cli.evaluation.report import FILE, Cost, EvaluationReport
from dydit_cli.evaluation.scoring import Scores, score
from dydit_cli.evaluation.settings import EvaluationSettings
from dydit_cli.processes.world import World
from dydit_cli.randomness import generator

LEAST_IMAGES = 2
STATISTICS = "statistics.npz"


@dataclass(frozen=True)
class Evaluated:
    """A report and the conditions that hold, each with the value met."""

    report: EvaluationReport
    failures: tuple[tuple[Condition, float], ...]


def evaluate(
    subject: str | Path,
    settings: EvaluationSettings,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    recipe_yaml: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Evaluated:
    """Evaluate a model, a folder of images or an archive.

    Args:
        subject: Its path.
        settings: What to measure.
        out: Folder to write: ``evaluation.json``, sheets of pairs and a manifest; nothing is written without it.
        overwrite: Replace ``out``.
        recipe_yaml: The resolved recipe, kept beside the report.
        on_progress: See `Progress`.

    Raises:
        DyditError: For what cannot be, before anything is sampled where possible.
    """
    started = time.perf_counter()
    opened = open_evaluation(subject, settings, out=out, overwrite=overwrite, on_progress=on_progress)
    settings, source, against, extractor = opened.settings, opened.source, opened.against, opened.extractor
    world, device, path = opened.world, opened.device, opened.path
    reference = None
    if opened.reference is not None and extractor is not None:
        reference = open_reference(opened.reference, extractor, on_progress, settings.videos, world)
    found = collect(source, extractor, keep_images=against is not None, on_progress=on_progress, world=world)
    scores = _scores(found, extractor, reference, opened.without_extractor)
    pairs = compare_with(against, found, on_progress, world) if against is not None else None
    report = EvaluationReport(
        name=path.name or str(path),
        subject=source.describe(),
        images=found.count * (found.frames or 1),
        videos=None if found.frames is None else found.count,
        reference=None if reference is None else reference.facts,
        extractor=None if extractor is None else extractor.describe(),
        metrics=scores.values,
        missing=scores.missing,
        pairs=None if pairs is None else pairs.report,
        cost=_cost(source, found, world),
        notes=_notes(found, extractor, scores),
        device=device_description(device),
        versions=versions(),
        seconds=time.perf_counter() - started,
    )
    # All have measured the same; the first writes.
    if out is not None and world.is_first:
        with artifact_folder(out, overwrite=overwrite) as folder:
            files = [FILE]
            if pairs is not None and against is not None and found.images is not None:
                names = (report.name, against.name)
                for title, indices in (("worst", pairs.report.worst), ("median", pairs.report.median)):
                    files.append(f"{title}_pairs.png")
                    heading = f"The {title} of {pairs.report.count} pairs"
                    write_sheet(
                        folder / files[-1], heading, names, found.images, pairs.images, indices, pairs.values
                    )
            if settings.statistics and extractor is not None:
                files.append(STATISTICS)
                write_statistics(folder / STATISTICS, found, extractor)
            report = replace(report, files=files)
            if recipe_yaml is not None:
                (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            content = report.to_json()
            write_json(folder / FILE, content)
            write_manifest(
                folder,
                stage="evaluate",
                settings=_recorded(settings),
                parent=path if path.is_dir() else None,
                results={"metrics": content["metrics"], "pairs": content["pairs"]},
                device=device,
            )
    # After the files: what was measured is kept, also where a condition cannot be judged.
    return Evaluated(report, _failures(opened.conditions, report))


def _scores(
    found: Collected, extractor: Extractor | None, reference: Reference | None, reason: str
) -> Scores:
    if extractor is None:
        return Scores({}, {"all distances": reason})
    if found.features is None or len(found.features) < LEAST_IMAGES:
        raise DyditError(
            "One image cannot be evaluated.",
            why="A distance is one between distributions; a covariance needs two images at least.",
            fix="Evaluate more images; thousands, for a value that others can compare with.",
        )
    return score(found, extractor, reference)


def _cost(source: ImageSource, found: Collected, world: World) -> Cost | None:
    if not isinstance(source, ModelImages) or found.ratios is None:
        return None
    facts = source.describe()
    ratio = bootstrapped_mean(found.ratios, generator(0, "ratio"))
    return Cost(
        parameters=facts["parameters"],
        static_mmacs=facts["static_mmacs"],
        mmacs=executed_mmacs(source.model, ratio.value),
        ratio=ratio,
        seconds_per_image=_seconds(found.batch_seconds, world.size),
    )


def _seconds(batches: Sequence[tuple[float, int]], processes: int) -> Measure | None:
    """Seconds an image takes a process, over whole batches of one size; the first batch of a process plans and packs, and is left
    out where others follow.
    """
    if not batches:
        return None
    size = batches[0][1]
    later = [seconds / count for seconds, count in batches[processes:] if count == size]
    if not later:
        return Measure(sum(seconds for seconds, _ in batches) / sum(count for _, count in batches))
    return bootstrapped_mean(torch.tensor(later, dtype=torch.float64), generator(0, "seconds"))


def _notes(found: Collected, extractor: Extractor | None, scores: Scores) -> list[str]:
    if extractor is None or found.features is None:
        return []
    notes = []
    size, count = found.features.pooled.shape[1], len(found.features)
    if scores.values and count < 10 * size:
        notes.append(
            f"{count} images for {size} features: distances are biased upwards; compare runs of the same number only."
        )
    return notes


def _failures(
    conditions: Sequence[Condition], report: EvaluationReport
) -> tuple[tuple[Condition, float], ...]:
    values = report.values()
    return tuple((condition, values[condition.key]) for condition in conditions if condition.holds(values))


def _recorded(settings: EvaluationSettings) -> dict[str, Any]:
    sampling = vars(settings.sampling) | {"keep_bias": str(settings.sampling.keep_bias)}
    others = {name: value for name, value in vars(settings).items() if name != "sampling"}
    return {**sampling, **others, "fail_if": list(settings.fail_if)}
