"""Which size a picture is prepared at, and how it is brought to it.

Pictures of different shapes go into buckets: sizes of about one area and several aspects. Nothing is enlarged as long as a bucket of
a smaller area is offered. ADM's centre crop is the case of one square bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

WIDEST = 2.0
"""Largest ratio of the sides of a bucket."""


def bucket_sizes(resolutions: Sequence[int], multiple: int, square: bool) -> list[tuple[int, int]]:
    """The sizes (width, height) on offer.

    Args:
        resolutions: Sides of squares, whose areas the buckets have at most.
        multiple: What each side is a multiple of.
        square: Whether there are only squares.
    """
    sizes = set()
    for resolution in resolutions:
        side = resolution // multiple * multiple
        sizes.add((side, side))
        width = side
        while not square and width + multiple <= resolution * math.sqrt(WIDEST):
            width += multiple
            height = resolution * resolution // width // multiple * multiple
            if height > 0 and width / height <= WIDEST:
                sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def choose_size(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of a picture: the nearest aspect of those that it fills, and of these the largest; else the nearest, smallest one."""
    aspect = math.log(width / height)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - aspect)

    filled = [size for size in sizes if size[0] <= width and size[1] <= height]
    if filled:
        area = max(size[0] * size[1] for size in filled)
        # Buckets of one resolution differ a little in area.
        return min(
            (size for size in filled if size[0] * size[1] > area / 2),
            key=lambda s: (distance(s), -s[0] * s[1]),
        )
    return min(sizes, key=lambda size: (size[0] * size[1] > 2 * min(a * b for a, b in sizes), distance(size)))


def cover_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture until it just covers a size, and cut the middle.

    Halving with a box filter first and finishing with a bicubic one keeps large images free of aliasing (Dhariwal and Nichol,
    guided-diffusion, whose centre crop this is for squares).
    """
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    factor = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    if scaled != image.size:
        image = image.resize(scaled, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
