"""A batch as a picture: clean samples above the same samples as a step sees them; videos as strips of frames."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dydit_cli.artifacts import atomic_write
from dydit_cli.training.rehearsal import Rehearsal

DPI = 120
SIDE = 1.5
"""Inches of an image; a strip of frames is as high."""
FRAMES = 8
"""Of a video, evenly taken."""
VIDEOS = 4
PIXELS = "pixels in [-1, 1]"
LATENTS = "latents: three of {channels} channels as colours (no autoencoder is at hand while training)"
INK = "#22303c"


def write_batch_picture(path: Path, rehearsal: Rehearsal) -> Path:
    """Draw the batch of a rehearsal into a PNG file."""
    from matplotlib.figure import Figure

    video = rehearsal.clean.ndim == 5
    count = min(len(rehearsal.clean), VIDEOS) if video else len(rehearsal.clean)
    pictures = [
        [as_colours(part[place], rehearsal.pixels) for part in (rehearsal.clean, rehearsal.noisy)]
        for place in range(count)
    ]
    height, width = pictures[0][0].shape[:2]
    # Images stand side by side in two rows; strips of frames below each other.
    rows, columns = (2 * count, 1) if video else (2, count)
    across = max(columns * SIDE * (width / height if video else 1.0) + 0.6, 5.5)
    down = rows * (SIDE + 0.28) + 0.75
    figure = Figure(figsize=(across, down), dpi=DPI, facecolor="white", layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for place, (clean, noisy) in enumerate(pictures):
        cells = (axes[2 * place, 0], axes[2 * place + 1, 0]) if video else (axes[0, place], axes[1, place])
        titles = (
            textwrap.shorten(rehearsal.captions[place], 110 if video else 46, placeholder=" …"),
            f"t = {rehearsal.times[place]:.4g}",
        )
        for cell, picture, title in zip(cells, (clean, noisy), titles, strict=True):
            cell.imshow(picture, interpolation="nearest")
            cell.set_title("\n".join(textwrap.wrap(title, 120 if video else 20)), fontsize=8, color=INK)
            cell.set_axis_off()
    channels = rehearsal.clean.shape[-3]
    kind = PIXELS if rehearsal.pixels else LATENTS.format(channels=channels)
    figure.suptitle(
        "\n".join(
            textwrap.wrap(
                f"Step {rehearsal.step + 1}: clean, and noised as training sees it; {kind}", int(13 * across)
            )
        ),
        fontsize=9,
        color=INK,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def as_colours(sample: Tensor, pixels: bool) -> NDArray[np.float32]:
    """(C, h, w) or (F, C, h, w) -> (h, w, 3) in [0, 1]; frames side by side, white between them."""
    if sample.ndim == 4:
        chosen = np.linspace(0, len(sample) - 1, min(FRAMES, len(sample))).round().astype(int)
        frames = [as_colours(sample[place], pixels) for place in chosen]
        gap = np.ones((frames[0].shape[0], max(1, frames[0].shape[1] // 16), 3), dtype=np.float32)
        return np.concatenate([part for frame in frames for part in (frame, gap)][:-1], axis=1)
    # Latents at the model's scale have a deviation of about one, so that three of them fill the range.
    shown = (sample if pixels else sample / 3).clamp(-1, 1).add(1).div(2).numpy()
    channels = shown[:3] if len(shown) >= 3 else np.repeat(shown[:1], 3, axis=0)
    return np.ascontiguousarray(channels.transpose(1, 2, 0), dtype=np.float32)
