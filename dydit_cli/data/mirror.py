"""Which samples may be mirrored while training.

A shirt stays a shirt in a mirror; a digit does not stay a digit, and a latent has no mirror image that the
autoencoder would agree with: a cache holds those of the mirrored images beside those of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dydit_cli.data.source import Draw, Source, Subset

FASHION_MNIST_NEVER = (5, 7, 9)
"""Sandal, sneaker and ankle boot: all point the same way in Fashion-MNIST; the shipped base models never
saw them mirrored.
"""


@dataclass(frozen=True)
class MirrorRule:
    """Whether samples are mirrored with probability one half, and the labels that never are."""

    enabled: bool
    never: frozenset[int] = frozenset()

    def allows(self, label: int) -> bool:
        """Whether a sample of this class may be mirrored."""
        return self.enabled and label not in self.never


@runtime_checkable
class MirroredSource(Protocol):
    """A source that may hold the mirrored samples beside the samples."""

    @property
    def has_mirror_images(self) -> bool:
        """Whether it does."""
        ...

    def mirrored_batch(self, indices: Sequence[int], draw: Draw | None, flips: Sequence[bool]) -> Tensor:
        """`Source.batch` with some samples mirrored."""
        ...


def flipped_batch(source: Source, indices: Sequence[int], draw: Draw | None, flips: Sequence[bool]) -> Tensor:
    """The samples with ``indices``, those with a true flip mirrored: (b, ..., h, w)."""
    if isinstance(source, Subset):
        return flipped_batch(source.source, source.indices[list(indices)].tolist(), draw, flips)
    if isinstance(source, MirroredSource):
        return source.mirrored_batch(indices, draw, flips)
    samples = source.batch(indices, draw)
    for position, flip in enumerate(flips):
        if flip:
            # The last dimension is the width, of all frames of a video alike.
            samples[position] = samples[position].flip(-1)
    return samples
