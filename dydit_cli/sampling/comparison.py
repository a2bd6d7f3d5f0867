"""The same images from several runs, in grids side by side: the picture that answers what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dydit_cli.artifacts import atomic_write
from dydit_cli.sampling.writing import image_grid

COLUMNS, SCALE = 10, 2
MARGIN, TITLE_HEIGHT, TITLE_SIZE = 16, 34, 18


def side_by_side(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Draw the samples of runs beside each other, enlarged so that small ones can be judged.

    Args:
        runs: (title, folder with ``samples.npz``) from left to right; image i stands at the same place in each.
        path: The PNG file to write.
    """
    grids = []
    for _, folder in runs:
        with np.load(folder / "samples.npz") as archive:
            grid = Image.fromarray(image_grid(archive["arr_0"], columns=COLUMNS))
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
