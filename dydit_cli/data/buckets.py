"""The order of training samples: one shape a batch, every sample once an epoch.

Latents of different resolutions cannot be stacked. So the samples of a shape form a bucket, the samples of a bucket are shuffled
anew for each epoch, and its batches are mixed with those of the other buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dydit_cli.data.source import Source, Subset
from dydit_cli.randomness import generator


@runtime_checkable
class BucketedSource(Protocol):
    """A source whose samples are not all of one shape."""

    @property
    def buckets(self) -> Tensor:
        """(n,) int64: samples of one number have one shape."""
        ...


def buckets_of(source: Source) -> Tensor | None:
    """(n,) numbers of the samples' buckets; None where all samples have one shape."""
    if isinstance(source, Subset):
        whole = buckets_of(source.source)
        return _unless_one(whole[source.indices]) if whole is not None else None
    return _unless_one(source.buckets) if isinstance(source, BucketedSource) else None


def _unless_one(buckets: Tensor) -> Tensor | None:
    return buckets if len(torch.unique(buckets)) > 1 else None


def same_shape(source: Source, indices: Sequence[int]) -> list[list[int]]:
    """Cut ``indices`` into parts of one shape, each in its order."""
    buckets = buckets_of(source)
    if buckets is None:
        return [list(indices)] if len(indices) else []
    parts: dict[int, list[int]] = {}
    for index in indices:
        parts.setdefault(int(buckets[index]), []).append(index)
    return [parts[bucket] for bucket in sorted(parts)]


@dataclass
class BucketedOrder:
    """Which samples make which batch, as a function of (seed, step).

    The last batch of a bucket is filled up with samples from the beginning of its order, so that small buckets are seen as well.

    Attributes:
        buckets: (n,) numbers of the samples' buckets.
        batch_size: Samples of a batch.
        seed: The run's seed.
    """

    buckets: Tensor
    batch_size: int
    seed: int
    _epochs: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)

    def at(self, step: int) -> list[int]:
        """The samples of the (0-based) ``step``."""
        epoch, place = divmod(step, self._batches_an_epoch())
        if epoch not in self._epochs:
            self._epochs = {epoch: self._epoch(epoch)}
        return self._epochs[epoch][place]

    def _batches_an_epoch(self) -> int:
        counts = torch.bincount(self.buckets).tolist()
        return sum(-(-count // self.batch_size) for count in counts)

    def _epoch(self, epoch: int) -> list[list[int]]:
        batches = []
        for bucket in torch.unique(self.buckets).tolist():
            members = torch.nonzero(self.buckets == bucket).flatten()
            order = members[
                torch.randperm(len(members), generator=generator(self.seed, "order", epoch, bucket))
            ].tolist()
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                while len(batch) < self.batch_size:
                    batch += order[: self.batch_size - len(batch)]
                batches.append(batch)
        shuffled = torch.randperm(len(batches), generator=generator(self.seed, "batches", epoch)).tolist()
        return [batches[place] for place in shuffled]
