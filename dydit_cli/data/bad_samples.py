"""Samples that cannot be read, and the ones that stand in for them.

A corrupt image among a million should not end a run of a week, and a folder that vanished should. So a run may be told to go on
with another sample in the place of a bad one. Which one is a function of seed, step, position and attempt, as every draw is: a
resumed run, and a run with other workers, replaces alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dydit_cli.data.source import Source, Subset
from dydit_cli.errors import DyditError

ATTEMPTS = 8
"""Samples that are tried in the place of a bad one; that many bad ones in a row are no accident."""

LARGEST_SHARE = 0.01
"""Of the samples may be bad; with more, the data are not what the user believes they are."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read.

    Attributes:
        key: Its name.
        what: The error in a sentence, which names the file.
    """

    key: str
    what: str


def replaced(
    source: Source,
    chosen: Sequence[int],
    read: Callable[[int, int], object],
    candidates: Callable[[int, int, int], int],
) -> tuple[list[int], tuple[BadSample, ...]]:
    """The samples of a batch with readable ones in the place of bad ones.

    Args:
        source: Of the samples.
        chosen: Those of the batch, by position.
        read: Reads the sample of a position, as the batch will: (position, sample).
        candidates: What to try instead: (position, sample, attempt) -> sample.

    Returns:
        The samples, and which were bad.

    Raises:
        DyditError: If `ATTEMPTS` others cannot be read either.
    """
    kept, bad = [], []
    for position, wanted in enumerate(chosen):
        sample = wanted
        failures: list[DyditError] = []
        while True:
            try:
                read(position, sample)
                break
            except DyditError as error:
                failures.append(error)
                bad.append(BadSample(source.key(sample), error.what))
            if len(failures) > ATTEMPTS:
                raise DyditError(
                    f"{len(failures)} samples in a row cannot be read. The first: {failures[0].what}",
                    why=f"{failures[0].why} Others in its place fail as well, so that it is no single bad file.",
                    fix="Check that the data are still there and whole.",
                ) from failures[0]
            sample = candidates(position, wanted, len(failures))
        kept.append(sample)
    return kept, tuple(bad)


@dataclass
class BadSamples:
    """Counts the bad samples of a run.

    Attributes:
        total: Samples that there are.
        found: What was bad, by the sample's name.
    """

    total: int
    found: dict[str, str] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """How many may be bad; one always may."""
        return max(1, int(self.total * LARGEST_SHARE))

    def see(self, bad: Sequence[BadSample]) -> tuple[str, ...]:
        """Count bad samples; return what to tell the user, a sentence for each that is new.

        Raises:
            DyditError: If there are too many.
        """
        told = []
        for sample in bad:
            if sample.key in self.found:
                continue
            self.found[sample.key] = sample.what
            told.append(f"{sample.what} Another sample takes its place ({len(self.found)} bad so far).")
        if len(self.found) > self.limit:
            named = ", ".join(list(self.found)[-3:])
            raise DyditError(
                f"{len(self.found)} of {self.total} samples cannot be read, such as {named}.",
                why=f"on_bad_sample 'skip' passes over {LARGEST_SHARE:.0%} of the samples ({self.limit}), and no more.",
                fix="Repair the data, or remove the bad files and start a new run.",
            )
        return tuple(told)


def readable_part(source: Source) -> tuple[Source, tuple[BadSample, ...]]:
    """A source without the samples that cannot be read, and these; every sample is read once.

    Raises:
        DyditError: If none can be read.
    """
    kept, bad = [], []
    for index in range(len(source)):
        try:
            source.batch([index])
            kept.append(index)
        except DyditError as error:
            bad.append(BadSample(source.key(index), error.what))
            last = error
    if not bad:
        return source, ()
    if not kept:
        raise DyditError(
            f"No held-out sample can be read. The last: {last.what}", why=last.why, fix=last.fix
        ) from last
    return Subset(source, torch.tensor(kept)), tuple(bad)


def pool_of(buckets: Tensor | None, sample: int, count: int) -> Tensor:
    """The samples that may stand in for one: those of its shape."""
    return torch.arange(count) if buckets is None else torch.nonzero(buckets == buckets[sample]).flatten()
