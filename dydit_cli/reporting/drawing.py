"""Samples of the static and the dynamic model from the same noise, for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.reporting.content import SampleRow, Samples
from dydit_cli.reporting.pictures import limits_of, picture
from dydit_cli.sampling.decoding import makes_pixels, open_vae, to_uint8
from dydit_cli.sampling.generate import Batch, generate


def draw_samples(
    model: DynamicModel,
    *,
    base: DynamicModel | None = None,
    num_images: int = 8,
    vae: str | Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> tuple[Samples, list[float]]:
    """Draw the same images twice: with the static model, and as the routers of the dynamic one say.

    Args:
        model: Compact; its execution is the same afterwards.
        base: The static model that it was made of. Without it the static row is the same weights with everything on, which after
            fine-tuning is no good model: they were trained with parts of them off.
        num_images: How many.
        vae: Folder of the autoencoder of a latent model; without it latents themselves are shown.
        on_progress: Told how many images of how many are done.
        settings: Of `generate`.

    Returns:
        The samples, and the ratio of each image of the dynamic model.
    """
    before = model.execution_options
    whole = model if base is None else base
    done = 0

    def drawn(of: DynamicModel, execution: str) -> list[Batch]:
        of.set_execution(execution)
        return list(
            generate(
                of,
                num_images=num_images,
                batch_size=num_images,
                on_progress=lambda count: on_progress(done + int(count), 2 * num_images),
                **settings,
            )
        )

    static = drawn(whole, "static")
    done = num_images
    dynamic = drawn(model, "compact")
    model.set_execution("static").set_execution(**before)
    ratios = [ratio for batch in dynamic for ratio in batch.ratios.tolist()]
    labels = [label for batch in dynamic for label in batch.labels]
    limits = limits_of(_samples(static))
    first = "static, as it was converted" if base is not None else "everything on, the same weights"
    rows = [
        SampleRow(first, _pixels(model, _samples(static), limits, vae)),
        SampleRow(
            f"dynamic, {sum(ratios) / len(ratios):.0%} of the work",
            _pixels(model, _samples(dynamic), limits, vae),
        ),
    ]
    steps = settings.get("steps", 50)
    latents = not makes_pixels(model.geometry.in_channels) and vae is None
    note = f"{steps} steps, the same noise in each column."
    if latents:
        note += " The model draws latents, of which three channels are shown: profile with a recipe whose sample section names a vae."
    names = tuple(f"class {label}" for label in labels) if model.geometry.num_classes else ("",) * num_images
    return Samples(tuple(rows), names, note), ratios


def _samples(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.samples.float().cpu() for batch in batches])


def _pixels(
    model: DynamicModel, samples: Tensor, limits: tuple[float, float], vae: str | Path | None
) -> NDArray:
    """(N, C, h, w), or (N, F, C, h, w) of videos -> bytes with three channels last."""
    frames = samples.flatten(0, 1) if samples.ndim == 5 else samples
    if vae is not None and not makes_pixels(model.geometry.in_channels):
        decoder = open_vae(vae, model.geometry.in_channels, model.device)
        values = to_uint8(
            torch.cat([decoder.decode(frame[None].to(model.device)) for frame in frames])
        ).numpy()
    elif makes_pixels(model.geometry.in_channels):
        values = to_uint8(frames).numpy()
    else:
        values = np.stack([_three(picture(frame, limits)) for frame in frames])
    values = np.repeat(values, 3, axis=-1) if values.shape[-1] == 1 else values
    shaped: NDArray = values.reshape(*samples.shape[:-3], *values.shape[1:])
    return shaped


def _three(pixels: NDArray) -> NDArray:
    return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels
