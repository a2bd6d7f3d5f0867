"""Grids of several runs side by side, each under its title: the picture that answers what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
MARGIN, TITLE_HEIGHT, TITLE_SIZE = 16, 34, 18


def side_by_side(grids: Sequence[tuple[str, Path]], path: Path) -> None:
    """Draw titled grid images of equal height beside each other, enlarged so that small samples can be judged.

    Args:
        grids: (title, PNG file) from left to right.
        path: The PNG file to write.
    """
    # Nearest neighbour, because a smooth enlargement would hide what the models draw.
    images = [Image.open(file).convert("RGB") for _, file in grids]
    large = [
        image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)
        for image in images
    ]
    width = sum(image.width for image in large) + MARGIN * (len(large) + 1)
    height = max(image.height for image in large) + TITLE_HEIGHT + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=TITLE_SIZE)
    left = MARGIN
    for (title, _), image in zip(grids, large, strict=True):
        draw.text((left + 4, (TITLE_HEIGHT - TITLE_SIZE) // 2), title, fill="black", font=font)
        canvas.paste(image, (left, TITLE_HEIGHT))
        left += image.width + MARGIN
    canvas.save(path, format="PNG")
