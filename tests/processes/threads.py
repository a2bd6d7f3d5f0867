"""A world of threads: what processes do together, without the time that starting them takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from dydit_cli.processes.world import Item, World

Result = TypeVar("Result")


class Table:
    """Where threads lay down what they give each other."""

    def __init__(self, size: int) -> None:
        self.places: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=300)


@dataclass(frozen=True)
class ThreadWorld(World):
    """See `World`; its group is a `Table`."""

    def gather(self, part: Item) -> list[Item]:
        self.group.places[self.rank] = part
        self.group.barrier.wait()
        parts = list(self.group.places)
        self.group.barrier.wait()
        return parts

    def to_first(self, part: Item) -> list[Item]:
        parts = self.gather(part)
        return parts if self.is_first else []

    def mean(self, value: Tensor) -> Tensor:
        return sum(self.gather(value.detach())) / self.size  # type: ignore[return-value]


def together(size: int, do: Callable[[World], Result]) -> list[Result]:
    """What ``do`` returns for each of ``size`` ranks."""
    table = Table(size)
    with ThreadPoolExecutor(size) as pool:
        started = [pool.submit(do, ThreadWorld(rank, size, rank, table)) for rank in range(size)]
        return [each.result(timeout=600) for each in started]
