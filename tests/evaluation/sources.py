"""What the tests of evaluation share: pictures, folders and archives of them, and a network that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dydit_cli.artifacts import save_model
from dydit_cli.evaluation.extractors.extractor import Features
from tests.tiny import tiny_model

SIZE = 6
CLASSES = 4


def pictures(
    count: int, seed: int = 0, side: int = 8, channels: int = 3, frames: int | None = None
) -> Tensor:
    """Random bytes (N, H, W, C), or (N, F, H, W, C)."""
    shape = (count, side, side, channels) if frames is None else (count, frames, side, side, channels)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def image_folder(folder: Path, images: Tensor) -> Path:
    """Write images as PNG files."""
    folder.mkdir(parents=True)
    for index, image in enumerate(images.numpy()):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{index:04d}.png")
    return folder


def archive(path: Path, images: Tensor, **more: Any) -> Path:
    """Write images as ADM's evaluation has them."""
    np.savez(path, arr_0=images.numpy(), **more)
    return path


def saved_model(folder: Path, family: str = "dit", **changes: Any) -> Path:
    """A tiny dynamic model of grey images of 32x32, which the shipped network can judge."""
    folder.mkdir(parents=True)
    save_model(
        tiny_model(family, **({"in_channels": 1, "sample_size": 32, "patch_size": 8} | changes)), folder
    )
    return folder


@dataclass
class Means:
    """A network that projects pixels at random: pooled, spatial and logits are linear in them."""

    name: str = "means"
    title: str = "means"
    sha256: str = "ab" * 32
    classes: int | None = CLASSES
    asked: int = 0

    def features(self, images: Tensor) -> Features:
        self.asked += len(images)
        flat = images.float().flatten(1) / 255
        weights = torch.randn(flat.shape[1], SIZE, generator=torch.Generator().manual_seed(0))
        pooled = flat @ weights
        return Features(pooled, pooled[:, :2].clone(), pooled[:, :CLASSES].clone())

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "feature_size": SIZE, "spatial_size": 2}


def silent(what: str, done: float, total: int) -> None:
    """No progress."""


def collected_pictures(sources: Sequence[Any]) -> Tensor:
    """All images of a source's batches."""
    return torch.cat([batch.images for batch in sources])
