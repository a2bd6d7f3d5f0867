"""Images or videos in batches, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dydit_cli.processes.world import ALONE, World


@dataclass(frozen=True)
class ImageBatch:
    """Images, or whole videos.

    Attributes:
        images: (B, H, W, C) bytes, or (B, F, H, W, C) for videos; C is 1 or 3.
        ratios: (B,) executed share of attention and MLP MACs, where a model made them.
        seconds: What sampling them took, where a model made them.
    """

    images: Tensor
    ratios: Tensor | None = None
    seconds: float | None = None


class ImageSource(Protocol):
    """Something that gives images.

    Attributes:
        kind: ``model``, ``folder``, ``npz``, ``video folder`` or ``video npz``.
        labels: The class of each image, where known.
    """

    @property
    def kind(self) -> str: ...

    @property
    def labels(self) -> list[int] | None: ...

    def __len__(self) -> int:
        """Images, or videos."""
        ...

    def batches(self, size: int, world: World = ALONE) -> Iterator[ImageBatch]:
        """All of them, in order; of several processes, each has every so many-th batch."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a report records: kind, path, number, and how they were made where that is known."""
        ...
