"""Sources over caches of latents and labels; `cached_text.py` adds texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dydit_cli.data.cache import CachedLatents, CacheIndex, read_index
from dydit_cli.data.source import Draw, SampleGeometry, checked_labels
from dydit_cli.errors import DyditError


class CachedSource:
    """Prepared latents as a source.

    Args:
        folder: The cache.
        geometry: The model's input, to which its latents must belong.

    Raises:
        DyditError: for a damaged cache, or one that does not fit the model.
    """

    def __init__(self, folder: Path, geometry: SampleGeometry) -> None:
        self.folder = folder
        self.index: CacheIndex = read_index(folder)
        self._latents = CachedLatents(folder, self.index)
        self._check_latents(geometry)
        self.labels: Tensor = self._checked_labels(geometry)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def buckets(self) -> Tensor:
        """See `BucketedSource`."""
        return self._latents.buckets

    @property
    def has_mirror_images(self) -> bool:
        """See `MirroredSource`."""
        return self.index.mirrored

    def key(self, index: int) -> str:
        """See `Source`."""
        return self._latents.keys[index]

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """See `Source`; the indices belong to one bucket."""
        return self._latents.batch(indices, draw)

    def mirrored_batch(self, indices: Sequence[int], draw: Draw | None, flips: Sequence[bool]) -> Tensor:
        """See `MirroredSource`."""
        return self._latents.batch(indices, draw, flips)

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.batch([index])[0], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "kind": "cached latents",
            "path": str(self.folder),
            "samples": len(self),
            "posterior": self.index.posterior,
            "scale": self.index.scale,
            "shift": self.index.shift,
        }

    def _checked_labels(self, geometry: SampleGeometry) -> Tensor:
        if self.index.text is not None:
            raise DyditError(
                f"The cache in {self.folder} holds texts, the model takes class labels.",
                why="It was prepared for a text-to-image model.",
                fix="Prepare the images with --vae VAE and no --pipeline, which stores their labels.",
            )
        numbers = self._latents.numbers
        return checked_labels(numbers.numpy(), len(numbers), geometry.num_classes, self.folder)

    def _check_latents(self, geometry: SampleGeometry) -> None:
        if self.index.channels != geometry.in_channels:
            raise DyditError(
                f"The cache in {self.folder} holds latents of {self.index.channels} channels, the model takes "
                f"{geometry.in_channels}.",
                why="They are another autoencoder's than the model's.",
                fix="Prepare the images again with the model's own autoencoder.",
            )
        side = geometry.sample_size
        other = next((s for s in self.index.latents if (s.height, s.width) != (side, side)), None)
        if other is not None and self.index.text is None:
            raise DyditError(
                f"The cache in {self.folder} holds latents of {other.height}x{other.width}, the model takes {side}x{side}.",
                why="A class-conditional model has one resolution.",
                fix="Prepare the images again at the model's resolution (--resolution).",
            )
