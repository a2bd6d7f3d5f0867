"""A run up to its first step: everything is opened, checked and put together, one batch is made, and nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dydit_cli.data import Batch, Source
from dydit_cli.data.cached_text import CachedTextSource
from dydit_cli.data.source import Subset
from dydit_cli.families.registry import family_of
from dydit_cli.processes.world import ALONE
from dydit_cli.recipe.loading import Recipe
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.finetuning import prepare
from dydit_cli.training.run_folder import recipe_text
from dydit_cli.training.step import NoisyBatch

SHOWN = 8
"""Samples of the batch that are shown."""


@dataclass(frozen=True)
class Rehearsal:
    """What a run would begin with.

    Attributes:
        recipe_yaml: The section that would run, with every default filled in.
        step: Steps done before, of a resumed run.
        clean: (n, C, h, w) of the first samples of the batch, or (n, F, C, h, w) of videos.
        noisy: Their mixture with noise.
        captions: What each is, and what it is conditioned on.
        times: Where each is noised.
        pixels: Whether these are pixels; else latents of an autoencoder, which is not at hand while training.
        facts: Numbers of the run by name.
        warnings: What looked odd.
    """

    recipe_yaml: str
    step: int
    clean: Tensor
    noisy: Tensor
    captions: list[str]
    times: list[float]
    pixels: bool
    facts: dict[str, Any]
    warnings: list[str]


def rehearse(settings: FinetuneSection, *, recipe: Recipe | None = None) -> Rehearsal:
    """Open, check and assemble a run, and make its next batch.

    Raises:
        DyditError: for whatever would end the run at its start.
    """
    # One process, however many the run will have: it looks at the whole batch.
    run = prepare(settings, recipe=recipe, world=ALONE)
    batch, noisy = run.next_batch()
    source, geometry = run.data.train, run.model.geometry
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    return Rehearsal(
        recipe_yaml=recipe_text(
            settings, None if recipe is None else replace(recipe, sections={}, incomplete={})
        ),
        step=run.done,
        clean=noisy.clean[:SHOWN].float().cpu(),
        noisy=noisy.noisy[:SHOWN].float().cpu(),
        captions=captions_of(source, batch, noisy, geometry.num_classes)[:SHOWN],
        times=noisy.t[:SHOWN].float().tolist(),
        pixels=geometry.in_channels in (1, 3),
        facts={
            "family": family_of(run.model).name,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "trained_parameters": trained,
            "training_samples": len(source),
            "held_out_samples": len(run.data.held_out),
            "data": source.describe()["kind"],
            "sample_shape": list(batch.clean.shape[1:]),
            "steps_left": settings.steps - run.done,
            "epochs": settings.steps * settings.batch_size / len(source),
        },
        warnings=run.warnings,
    )


def captions_of(source: Source, batch: Batch, noisy: NoisyBatch, num_classes: int) -> list[str]:
    """What the samples of a batch are, in words: their prompts, or the names of their classes."""
    prompts = _prompts(source)
    labels = source.labels[list(batch.samples)].tolist()
    if prompts is not None:
        return [prompts[label] for label in labels]
    if not num_classes:
        return ["" for _ in labels]
    names: Sequence[str] = source.describe().get("classes") or ()
    condition = noisy.condition if isinstance(noisy.condition, Tensor) else torch.tensor(labels)
    return [
        (names[label] if label < len(names) else f"class {label}")
        + (" (label dropped)" if used == num_classes else "")
        for label, used in zip(labels, condition.tolist(), strict=True)
    ]


def _prompts(source: Source) -> list[str] | None:
    if isinstance(source, Subset):
        return _prompts(source.source)
    return source.prompts if isinstance(source, CachedTextSource) else None
