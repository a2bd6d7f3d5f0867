"""Run a source through a feature network, once, keeping what the metrics need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.extractors.extractor import Extractor, Features, joined
from dydit_cli.evaluation.inputs.source import ImageBatch, ImageSource
from dydit_cli.processes.world import ALONE, World

Progress = Callable[[str, float, int], None]
"""Told what is being done, how much of it is, and of how much."""

FEATURE_BATCH = 64


@dataclass(frozen=True)
class Collected:
    """What a pass over a source gave.

    Attributes:
        features: Of all images, or of all frames of all videos in turn; None without a network.
        images: (N, H, W, C) or (N, F, H, W, C) bytes, if they were to be kept.
        count: Images or videos.
        frames: Of each video; None for images.
        labels: Of each image or video, where known.
        ratios: (N,) executed shares, where a model made the images.
        batch_seconds: (seconds, images) of each batch that a model made.
    """

    features: Features | None
    images: Tensor | None
    count: int
    frames: int | None
    labels: list[int] | None
    ratios: Tensor | None
    batch_seconds: tuple[tuple[float, int], ...]

    @property
    def clusters(self) -> Tensor | None:
        """(N · F,) the video of each frame; None for images."""
        return None if self.frames is None else torch.arange(self.count).repeat_interleave(self.frames)

    @property
    def steps_between_frames(self) -> Tensor | None:
        """(N, F − 1, D) differences of the features of consecutive frames; None for images and videos of one frame."""
        if self.features is None or self.frames is None or self.frames < 2:
            return None
        return self.features.pooled.unflatten(0, (self.count, self.frames)).diff(dim=1)


def collect(
    source: ImageSource,
    extractor: Extractor | None,
    *,
    keep_images: bool = False,
    what: str = "images",
    on_progress: Progress = lambda what, done, total: None,
    world: World = ALONE,
) -> Collected:
    """Read or sample all images, extract their features, and keep the images if asked.

    Several processes share the batches, and all of them get everything, in its order.

    Raises:
        DyditError: As the source and the network do.
    """
    own: list[_Part] = []
    done = 0
    for batch in source.batches(FEATURE_BATCH, world):
        own.append(
            _Part(
                len(batch.images),
                batch.images.shape[1] if batch.images.ndim == 5 else None,
                _features(batch, extractor) if extractor is not None else [],
                batch.images if keep_images else None,
                batch.ratios,
                batch.seconds,
            )
        )
        done += len(batch.images) * world.size
        on_progress(what, min(done, len(source)), len(source))
    # Batches went round: the first of every process, then the second of every process.
    rounds = zip_longest(*world.gather(own))
    parts = [part for among in rounds for part in among if part is not None]
    features = [rows for part in parts for rows in part.features]
    kept = [part.images for part in parts if part.images is not None]
    ratios = [part.ratios for part in parts if part.ratios is not None]
    return Collected(
        joined(features) if features else None,
        torch.cat(kept) if kept else None,
        sum(part.count for part in parts),
        parts[-1].frames if parts else None,
        source.labels,
        torch.cat(ratios) if ratios else None,
        tuple((part.seconds, part.count) for part in parts if part.seconds is not None),
    )


@dataclass(frozen=True)
class _Part:
    """What a batch gave; see `Collected`."""

    count: int
    frames: int | None
    features: list[Features]
    images: Tensor | None
    ratios: Tensor | None
    seconds: float | None


def _features(batch: ImageBatch, extractor: Extractor) -> list[Features]:
    images = batch.images.flatten(0, 1) if batch.images.ndim == 5 else batch.images
    return [extractor.features(rows) for rows in images.split(FEATURE_BATCH)]


def refuse_mismatch(first: Collected, second: Collected) -> None:
    """Raise unless two passes can be compared pair by pair.

    Raises:
        DyditError: If their images differ in number or size.
    """
    if first.images is None or second.images is None:
        raise TypeError("images were not kept")
    if first.images.shape != second.images.shape:
        shapes = " and ".join(
            "x".join(map(str, each.images.shape)) for each in (first, second) if each.images is not None
        )
        raise DyditError(
            "The two sets of images cannot be paired.",
            why=f"They are {shapes}: number, size or channels differ.",
            fix="Make both with the same number, size and seed; image i of one belongs to image i of the other.",
        )
