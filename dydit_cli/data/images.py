"""Images that lie in memory as bytes or floats: what IDX files and .npz files become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dydit_cli.data.source import Draw, SampleGeometry, VideoGeometry
from dydit_cli.errors import DyditError


class ArrayImages:
    """Images in memory, kept in their own type and turned to [-1, 1] when read.

    Args:
        images: (n, C, h, w), or (n, F, C, h, w) of videos; uint8, or floats in [-1, 1].
        labels: (n,) int64.
        padding: Pixels of black added on every side of an image or frame.
        kind: Where they come from, for the manifest.
        path: The file or folder, for the manifest.
    """

    def __init__(self, images: NDArray[Any], labels: Tensor, *, padding: int, kind: str, path: Path) -> None:
        self.images = images
        self.labels = labels
        self.padding = padding
        self.kind = kind
        self.path = path

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        """See `Source`."""
        return str(index)

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """See `Source`. Nothing is drawn."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[list(indices)]))
        scaled = pixels.float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels.float()
        # Black is -1 after scaling: 0 bytes around a byte image, as in the base models' training.
        return F.pad(scaled, [self.padding] * 4, value=-1.0) if self.padding else scaled

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.batch([index])[0], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {"kind": self.kind, "path": str(self.path), "samples": len(self)}


def planar(images: NDArray[Any], where: Path, geometry: SampleGeometry) -> NDArray[Any]:
    """Bring (n, h, w), (n, h, w, C) or (n, C, h, w) images to (n, C, h, w) and check them against the model.

    Raises:
        DyditError: for another number of dimensions, resolution or channels than the model's.
    """
    channels, size = geometry.in_channels, geometry.sample_size
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3, 4) and images.shape[1:3] != (channels, size):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4:
        raise DyditError(
            f"{where} holds images of shape {tuple(images.shape)}.",
            why="Images are (n, height, width), (n, height, width, channels) or (n, channels, height, "
            "width).",
            fix="Save the images with one of these shapes.",
        )
    if images.shape[2:] != (size, size):
        raise DyditError(
            f"{where} holds images of {images.shape[2]}x{images.shape[3]}, the model takes {size}x{size}.",
            why="Arrays are used pixel by pixel: nothing is resized in secret.",
            fix=f"Resize or pad the images to {size}x{size}, or give them as an image folder, which is "
            "cropped and resized.",
        )
    if images.shape[1] != channels:
        raise DyditError(
            f"{where} holds images of {images.shape[1]} channel(s), the model takes {channels}.",
            why="Arrays are used as they are: colours are not converted in secret.",
            fix=f"Convert the images to {channels} channel(s), or give them as an image folder, which is "
            "converted.",
        )
    return images


def planar_videos(videos: NDArray[Any], where: Path, geometry: VideoGeometry) -> NDArray[Any]:
    """Bring (n, F, h, w), (n, F, h, w, C) or (n, F, C, h, w) videos to (n, F, C, h, w) and check them against the model.

    Raises:
        DyditError: for another number of dimensions, frames, resolution or channels than the model's.
    """
    frames = geometry.num_frames
    if videos.ndim not in (4, 5) or videos.shape[1] != frames:
        raise DyditError(
            f"{where} holds videos of shape {tuple(videos.shape)}.",
            why=f"The model takes {frames} frames: (n, {frames}, height, width), with channels after the width or before "
            "the height.",
            fix="Save clips of that length, or give the videos as files in a folder, from which clips are cut.",
        )
    images = planar(videos.reshape(-1, *videos.shape[2:]), where, geometry)
    return images.reshape(len(videos), frames, *images.shape[1:])


def in_unit_range(images: NDArray[Any], where: Path) -> NDArray[Any]:
    """Return uint8 images unchanged and float images as fp32 in [-1, 1].

    Floats in [0, 1] are stretched to [-1, 1]; floats that reach below zero are taken to be in [-1, 1]
    already.

    Raises:
        DyditError: for another type, for values outside both ranges, and for values that are not numbers.
    """
    if images.dtype == np.uint8:
        return images
    low, high = (float(images.min()), float(images.max())) if images.dtype.kind == "f" else (np.nan, np.nan)
    if images.dtype.kind != "f" or not (low >= -1.001 and high <= 1.001):
        found = f"values from {low:g} to {high:g}" if images.dtype.kind == "f" else f"the type {images.dtype}"
        raise DyditError(
            f"The images in {where} have {found}.",
            why="Images are bytes (uint8), or floats in [0, 1] or [-1, 1].",
            fix="Save them as uint8, or scale them to [-1, 1].",
        )
    floats = images.astype(np.float32)
    return floats if low < 0 else floats * 2 - 1
