"""Grids of several runs in one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dydit_cli.sampling.comparison import COLUMNS, MARGIN, SCALE, TITLE_HEIGHT, side_by_side


def test_the_same_image_stands_at_the_same_place_of_each_grid(tmp_path: Path) -> None:
    images = np.full((2 * COLUMNS, 8, 8, 3), 30, np.uint8)
    for name, value in (("static", 100), ("dynamic", 200)):
        images[COLUMNS + 1] = value  # second row, second column
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "samples.npz", arr_0=images)
    side_by_side([("static", tmp_path / "static"), ("dynamic", tmp_path / "dynamic")], tmp_path / "both.png")
    picture = np.asarray(Image.open(tmp_path / "both.png"))
    cell = 10 * SCALE  # 8 pixels and 2 of padding
    grid_width = (COLUMNS * 10 + 2) * SCALE
    assert picture.shape == (2 * cell + 2 * SCALE + TITLE_HEIGHT + MARGIN, 2 * grid_width + 3 * MARGIN, 3)
    row, column = TITLE_HEIGHT + cell + cell // 2, MARGIN + cell + cell // 2
    assert picture[row, column].tolist() == [100, 100, 100]
    assert picture[row, column + grid_width + MARGIN].tolist() == [200, 200, 200]
    assert picture[row, column + cell].tolist() == [30, 30, 30]
