"""Run sides against each other: threads and clock set for the time being, warm-ups, an estimate, and paired rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dydit_cli.benchmarking.settings import CLOCKS
from dydit_cli.profiling.timing import interleaved

Progress = Callable[[str, int, int], None]
Estimate = Callable[[float], None]

WARMUPS = 2
"""Untimed rounds: the first packs weights and takes memory from the system, the second shows what a round takes."""


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads for a while; 0 changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass
class Contest:
    """Times the sides of several rows and tells how far it is.

    Attributes:
        clock: ``cpu`` or ``wall``.
        device: Waited for at the end of each run.
        pairs: Rounds of a row.
        images: Images of each row's round, from which the time of rows to come is estimated.
        on_progress: Told what runs, and how many runs of how many are done in this row.
        on_estimate: Told once, after the first warm-up, how many seconds all will take.
    """

    clock: str
    device: torch.device
    pairs: int
    images: list[int]
    on_progress: Progress
    on_estimate: Estimate
    _row: int = field(default=0)

    def run(self, title: str, sides: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every round, by side."""
        done, total = 0, len(sides) * (WARMUPS + self.pairs)

        def whole(side: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                side()
                synchronize(self.device)

            return run

        def count() -> None:
            nonlocal done
            done += 1
            self.on_progress(title, done, total)

        self.on_progress(title, 0, total)
        runs = {name: whole(side) for name, side in sides.items()}
        taken = 0.0
        for _ in range(WARMUPS):
            started = time.perf_counter()
            for run in runs.values():
                run()
                count()
            taken = time.perf_counter() - started
        if self._row == 0:
            rounds = sum(images / self.images[0] for images in self.images)
            self.on_estimate(taken * rounds * (WARMUPS + self.pairs))
        self._row += 1
        return interleaved(runs, self.pairs, CLOCKS[self.clock], warmups=0, on_run=count)
