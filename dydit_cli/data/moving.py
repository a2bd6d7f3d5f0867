"""Garments of Fashion-MNIST that drift over a black canvas and bounce off its edges: videos made from still images.

In the manner of Moving MNIST (Srivastava et al., 2015), with one garment a video, so that the class says all that there is
to see. A garment is three quarters of the canvas wide and drifts slowly: a small model on a small machine
learns that; at five eighths and twice the speed its garments could not be told apart after an hour of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dydit_cli.data.folder import as_pixels
from dydit_cli.data.idx import read_idx_folder
from dydit_cli.data.images import ArrayImages
from dydit_cli.data.source import Draw, VideoGeometry
from dydit_cli.randomness import uniform

IMAGE_SIZE = 28
GARMENT_SHARE = 3 / 4
"""Of the canvas: 24 pixels of 32."""
SLOWEST, FASTEST = 1 / 64, 3 / 64
"""Speeds in canvas sides a frame: 0.5 to 1.5 pixels of 32, hence 3 to 10 over 8 frames, in a range of 8."""


@dataclass(frozen=True)
class _Still:
    """The geometry of the images that the videos are made of."""

    num_classes: int
    in_channels: int
    sample_size: int = IMAGE_SIZE


@dataclass(frozen=True)
class Motion:
    """How a garment moves, in shares of the room that it has.

    Attributes:
        start: Its place in the first frame, x and y in [0, 1].
        step: What is added in each frame; a place beyond an edge is reflected.
    """

    start: tuple[float, float]
    step: tuple[float, float]

    def at(self, frame: int) -> tuple[float, float]:
        """Its place in a frame, x and y in [0, 1]."""
        x, y = (_reflected(start + frame * step) for start, step in zip(self.start, self.step, strict=True))
        return x, y


def motion_of(part: str, index: int) -> Motion:
    """The motion of one video, a function of its number alone: the same in every run."""
    x, y, turn, speed = uniform(0, (4,), "moving garments", part, index).tolist()
    # Speeds are in sides of the canvas, steps in shares of the room that a garment leaves.
    length = (SLOWEST + speed * (FASTEST - SLOWEST)) / (1 - GARMENT_SHARE)
    return Motion((x, y), (length * math.cos(2 * math.pi * turn), length * math.sin(2 * math.pi * turn)))


class MovingGarments:
    """Videos made from still images; the label is the image's.

    Args:
        images: Grey images of 28 x 28.
        part: ``train`` or ``t10k``: the same number moves differently in the two.
        geometry: The model's input.
    """

    def __init__(self, images: ArrayImages, part: str, geometry: VideoGeometry) -> None:
        self.images = images
        self.labels = images.labels
        self.part = part
        self.frames = geometry.num_frames
        self.size = geometry.sample_size

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        """See `Source`."""
        return self.images.key(index)

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """(b, F, 1, size, size); see `Source`. Nothing is drawn."""
        return torch.stack([self._video(index) for index in indices])

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.batch([index])[0], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "kind": "moving garments",
            "path": str(self.images.path),
            "samples": len(self),
            "frames": self.frames,
        }

    def _video(self, index: int) -> Tensor:
        side = round(self.size * GARMENT_SHARE)
        # Pillow's resampling counts in whole numbers: the same bytes on every machine.
        still = Image.fromarray(np.asarray(self.images.images[index, 0]))
        garment = as_pixels(still.resize((side, side), Image.Resampling.LANCZOS))
        motion = motion_of(self.part, index)
        video = torch.full((self.frames, 1, self.size, self.size), -1.0)
        for frame in range(self.frames):
            left, top = (round(share * (self.size - side)) for share in motion.at(frame))
            video[frame, :, top : top + side, left : left + side] = garment
        return video


def read_moving_garments(
    folder: Path, geometry: VideoGeometry
) -> tuple[MovingGarments, MovingGarments | None, bool]:
    """Make videos of the images in a folder of IDX files.

    Returns:
        Training videos, held-out videos if there are t10k files, and whether the folder is known to be Fashion-MNIST.

    Raises:
        DyditError: as `read_idx_folder`.
    """
    parts = read_idx_folder(folder, _Still(geometry.num_classes, geometry.in_channels))
    held_out = MovingGarments(parts.held_out, "t10k", geometry) if parts.held_out is not None else None
    return MovingGarments(parts.train, "train", geometry), held_out, parts.is_fashion_mnist


def _reflected(place: float) -> float:
    """Fold a place on the line into [0, 1], as a ball between two walls."""
    return 1.0 - abs(place % 2.0 - 1.0)
