"""The same images (or videos) from several runs, side by side: the picture that answers what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dydit_cli.artifacts import atomic_write
from dydit_cli.sampling.video_writing import frame_sheet
from dydit_cli.sampling.writing import image_grid

COLUMNS, SCALE = 10, 2
MARGIN, TITLE_HEIGHT, TITLE_SIZE = 16, 34, 18


def side_by_side(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Draw the samples of runs beside each other, enlarged so that small ones can be judged; a video is a row of frames.

    Args:
        runs: (title, folder with ``samples.npz``) from left to right; image i stands at the same place in each.
        path: The PNG file to write.
    """
    grids = []
    for _, folder in runs:
        with np.load(folder / "samples.npz") as archive:
            grid = Image.fromarray(picture_of_samples(archive["arr_0"]))
        # Nearest neighbour, because a smooth enlargement would hide what the models draw.
        grids.append(grid.resize((grid.width * SCALE, grid.height * SCALE), Image.Resampling.NEAREST))
    width = sum(grid.width for grid in grids) + MARGIN * (len(grids) + 1)
    canvas = Image.new("RGB", (width, max(grid.height for grid in grids) + TITLE_HEIGHT + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=TITLE_SIZE)
    left = MARGIN
    for (title, _), grid in zip(runs, grids, strict=True):
        draw.text((left + 4, (TITLE_HEIGHT - TITLE_SIZE) // 2), title, fill="black", font=font)
        canvas.paste(grid, (left, TITLE_HEIGHT))
        left += grid.width + MARGIN
    with atomic_write(path) as temporary:
        canvas.save(temporary, format="PNG")


def picture_of_samples(samples: NDArray) -> NDArray:
    """Lay out images (N, H, W, 3) as a grid, videos (N, F, H, W, 3) as a sheet of their frames."""
    return image_grid(samples, columns=COLUMNS) if samples.ndim == 4 else frame_sheet(samples)
