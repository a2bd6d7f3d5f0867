"""Batches as a pure function of (seed, step): no iterator has a state, so resuming means naming the step.

Position p = step * batch_size + i of the endless stream of samples belongs to epoch p // n, and is sample
number p % n of that epoch's permutation. (Samples of several shapes go by `buckets.py` instead.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dydit_cli.data.bad_samples import BadSample, pool_of, replaced
from dydit_cli.data.buckets import BucketedOrder, buckets_of
from dydit_cli.data.conditions import conditions_of
from dydit_cli.data.mirror import MirrorRule, flipped_batch
from dydit_cli.data.source import Source
from dydit_cli.errors import DyditError
from dydit_cli.families.text_condition import Condition
from dydit_cli.randomness import generator, normal, uniform


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        clean: (B, C, size, size) fp32, or (B, F, C, size, size) of videos; in [-1, 1], or scaled latents.
        condition: (B,) class labels, or texts.
        indices: The samples' positions in the global batch; every draw of a sample is named by (seed, step,
            position).
        samples: Their numbers in the source.
        bad: Samples that could not be read; others stand in their places.
    """

    clean: Tensor
    condition: Condition
    indices: tuple[int, ...]
    samples: tuple[int, ...] = ()
    bad: tuple[BadSample, ...] = ()


@dataclass
class TrainingBatches:
    """The endless, seeded stream of training batches.

    Attributes:
        source: The training samples.
        batch_size: Samples of one step.
        seed: The run's seed.
        mirror: Which samples may be mirrored.
        skip_bad: Whether others take the places of samples that cannot be read; else these are errors.
        rank, processes: This process's number, and how many there are: each reads its own part of every batch.
    """

    source: Source
    batch_size: int
    seed: int
    mirror: MirrorRule
    skip_bad: bool = False
    rank: int = 0
    processes: int = 1
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _bucketed: BucketedOrder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        buckets = buckets_of(self.source)
        if buckets is not None:
            self._bucketed = BucketedOrder(buckets, self.batch_size, self.seed)

    def at(self, step: int) -> Batch:
        """This process's part of the batch of the (0-based) ``step``, whatever was read before."""
        first, last = (self.batch_size * rank // self.processes for rank in (self.rank, self.rank + 1))
        positions = tuple(range(first, last))
        chosen = self._samples_of(step)[first:last]
        try:
            return self._read(step, positions, chosen)
        except DyditError:
            if not self.skip_bad:
                raise
        buckets = buckets_of(self.source)

        def instead(position: int, sample: int, attempt: int) -> int:
            pool = pool_of(buckets, sample, len(self.source))
            drawn = float(uniform(self.seed, (), "replacement", step, positions[position], attempt))
            return int(pool[int(drawn * len(pool))])

        kept, bad = replaced(
            self.source,
            chosen,
            lambda position, sample: self._read(step, positions[position : position + 1], [sample]),
            instead,
        )
        return replace(self._read(step, positions, kept), bad=bad)

    def _read(self, step: int, positions: tuple[int, ...], chosen: Sequence[int]) -> Batch:
        """The samples ``chosen`` as those of some positions of a step's batch."""

        def draw(place: int, shape: tuple[int, ...]) -> Tensor:
            return normal(self.seed, shape, "posterior", step, positions[place])

        flips = [
            self.mirror.allows(label) and float(uniform(self.seed, (), "mirror", step, position)) < 0.5
            for position, label in zip(positions, self.source.labels[list(chosen)].tolist(), strict=True)
        ]
        clean = flipped_batch(self.source, chosen, draw, flips)
        return Batch(clean, conditions_of(self.source, chosen), positions, tuple(chosen))

    def between(self, start: int, stop: int, num_workers: int = 0) -> Iterator[Batch]:
        """The batches of the steps from ``start`` to before ``stop``, read ahead by ``num_workers``
        processes.

        Raises:
            DyditError: what reading a sample raised, also where a worker raised it.
        """
        if num_workers == 0:
            yield from (self.at(step) for step in range(start, stop))
            return
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=_as_sampler(start, stop),
            num_workers=num_workers,
            prefetch_factor=2,
        )
        items = iter(loader)
        for step in range(start, stop):
            try:
                item = next(items)
            except RuntimeError as error:
                # torch's words for a worker that the system or somebody killed, most often for lack of memory.
                if "DataLoader worker" not in str(error):
                    raise
                raise DyditError(
                    f"A process that reads data ended before step {step + 1}.",
                    why=f"The system reports: {str(error).splitlines()[0]}",
                    fix="See whether memory ran out; lower num_workers, then resume the run.",
                ) from error
            if isinstance(item, _Failure):
                raise DyditError(item.what, why=item.why, fix=item.fix)
            yield item

    def _samples_of(self, step: int) -> list[int]:
        if self._bucketed is not None:
            return self._bucketed.at(step)
        return [self._sample_at(step * self.batch_size + index) for index in range(self.batch_size)]

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if epoch not in self._orders:
            # A batch may straddle the end of an epoch; older permutations are never asked for again.
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = torch.randperm(
                len(self.source), generator=generator(self.seed, "order", epoch)
            )
        return int(self._orders[epoch][place])


@dataclass(frozen=True)
class _Failure:
    """A `DyditError` on its way out of a worker process: torch cannot rebuild an exception of three parts."""

    what: str
    why: str
    fix: str


class _Steps(Dataset[Batch | _Failure]):
    """Batches by step, for `DataLoader`'s workers."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self.batches.at(step)
        except DyditError as error:
            return _Failure(error.what, error.why, error.fix)


def _as_sampler(start: int, stop: int) -> Sequence[int]:
    return range(start, stop)
