"""Pictures of pairs: the two images, what differs between them, and the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dydit_cli.artifacts import atomic_write
from dydit_cli.evaluation.pairs.comparison import LPIPS, PSNR, SSIM

PAIRS = 12
COLUMNS = 2
LEAST_SIDE, MOST_SIDE = 128, 256
MARGIN, GAP, TEXT, TITLE = 16, 6, 15, 19
AMPLIFIED = 4
NAMES = {PSNR: "PSNR {:.1f} dB", SSIM: "SSIM {:.3f}", LPIPS: "LPIPS {:.3f}"}


def write_sheet(
    path: Path,
    title: str,
    names: tuple[str, str],
    first: Tensor,
    second: Tensor,
    indices: Sequence[int],
    values: Mapping[str, Tensor],
) -> None:
    """Draw pairs, two a row: one, the other, and their difference four times enlarged in strength.

    Args:
        path: The PNG file to write.
        title: Of the sheet.
        names: Of the two sets.
        first: (N, H, W, C) or (N, F, H, W, C) bytes; a video is shown by its middle frame.
        second: The other set.
        indices: Pairs to draw, in this order; at most twelve.
        values: Of all pairs by measure.
    """
    chosen = list(indices)[:PAIRS]
    cells = [
        _cell(_picture(first[index]), _picture(second[index]), names, f"#{index}  {_values(values, index)}")
        for index in chosen
    ]
    rows = -(-len(cells) // COLUMNS)
    width, height = cells[0].size
    columns = min(COLUMNS, len(cells))
    top = TITLE + 2 * MARGIN
    canvas = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, top + rows * (height + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, fill="black", font=ImageFont.load_default(size=TITLE))
    for position, cell in enumerate(cells):
        row, column = divmod(position, COLUMNS)
        canvas.paste(cell, (MARGIN + column * (width + MARGIN), top + row * (height + MARGIN)))
    with atomic_write(path) as temporary:
        canvas.save(temporary, format="PNG")


def _values(values: Mapping[str, Tensor], index: int) -> str:
    return "  ".join(
        form.format(float(values[name][index])) for name, form in NAMES.items() if name in values
    )


def _picture(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim == 4:
        image = image[len(image) // 2]
    return np.asarray(image.expand(-1, -1, 3).numpy())


def _cell(first: NDArray, second: NDArray, names: tuple[str, str], caption: str) -> Image.Image:
    apart = np.abs(first.astype(np.int16) - second.astype(np.int16)) * AMPLIFIED
    pictures = [first, second, apart.clip(0, 255).astype(np.uint8)]
    longest = max(first.shape[:2])
    # Whole factors and no smoothing, which would hide what differs; large pictures are made smaller.
    factor = max(1, round(LEAST_SIDE / longest)) if longest < LEAST_SIDE else min(1.0, MOST_SIDE / longest)
    width, height = round(first.shape[1] * factor), round(first.shape[0] * factor)
    font = ImageFont.load_default(size=TEXT)
    line = TEXT + 6
    cell = Image.new("RGB", (3 * width + 2 * GAP, height + 2 * line), "white")
    draw = ImageDraw.Draw(cell)
    draw.text((0, 0), caption, fill="black", font=font)
    kind = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    for position, (picture, name) in enumerate(
        zip(pictures, (*names, f"{AMPLIFIED} x difference"), strict=True)
    ):
        left = position * (width + GAP)
        draw.text((left, line), name, fill="#666666", font=font)
        cell.paste(Image.fromarray(picture).resize((width, height), kind), (left, 2 * line))
    return cell
