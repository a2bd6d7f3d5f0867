"""The processes of a run: how many there are, which of them this is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError
from dydit_cli.processes.environment import LOCAL_RANK, RANK, WORLD_SIZE, is_launched

Item = TypeVar("Item")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first may be writing a checkpoint of tens of gigabytes meanwhile."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: Number of this process; the first, 0, is the only one that writes files and speaks.
        size: Number of processes.
        local_rank: Number of this process among those of its machine, which is also that of its GPU.
        group: torch's process group for what lies on CPUs; None where there is nobody to ask.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = field(default=None, repr=False)

    @property
    def joined(self) -> bool:
        """Whether a launcher started it, though it may be the only one."""
        return self.group is not None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device called ``name``; of several processes on CUDA, each has its own.

        Raises:
            DyditError: If it is not there, one device is named for all processes, or it is one that processes cannot share.
        """
        device = find_device(name)
        if device.type == "mps" and self.size > 1:
            raise DyditError(
                f"Apple's GPU cannot be shared by {self.size} processes.",
                why="Processes talk through torch's Gloo, which knows tensors on CPUs and on CUDA devices.",
                fix="Pass --device cpu, or leave processes at 1.",
            )
        if device.type != "cuda" or not is_launched():
            return device
        if device.index is not None and self.size > 1:
            raise DyditError(
                f"The device '{name}' is named for {self.size} processes.",
                why="Each process has a GPU of its own, number 0 to the number of processes on a machine.",
                fix="Pass --device cuda; CUDA_VISIBLE_DEVICES chooses among the GPUs.",
            )
        present = torch.cuda.device_count()
        if self.local_rank >= present:
            raise DyditError(
                f"Process {self.rank} of {self.size} has no GPU.",
                why=f"It is number {self.local_rank} on its machine, which has {present}.",
                fix=f"Pass --processes {present}, or --device cpu.",
            )
        return torch.device("cuda", self.local_rank)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, without gradient."""
        if not self.joined:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather(flag))

    def gather(self, part: Item) -> list[Item]:
        """What every process gave, in the order of ranks, to all of them. Tensors in it must be on the CPU."""
        if not self.joined:
            return [part]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part, group=self.group)
        return parts

    def to_first(self, part: Item) -> list[Item]:
        """What every process gave, in the order of ranks, to the first; nothing to the others. Tensors in it must be on the CPU."""
        if not self.joined:
            return [part]
        parts: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(part, parts, dst=0, group=self.group)
        return parts or []

    def wait(self) -> None:
        """Until all processes are here."""
        if self.joined:
            self.gather(None)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of ``items``: whole runs in the order of ranks, as equal as they can be; perhaps none."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def has(self, number: int) -> bool:
        """Whether piece of work ``number`` is this process's, where pieces go round."""
        return number % self.size == self.rank


ALONE = World()
"""One process that no launcher started."""


def join(processes: int, device: str = "auto") -> World:
    """Meet the other processes of a run.

    Args:
        processes: How many the run asks for.
        device: As the run names it; decides how processes talk (NCCL for CUDA, gloo for a CPU).

    Raises:
        DyditError: If there are not as many as asked for: numbers, and on a CPU bits, would not be what the recipe says.
    """
    if not is_launched():
        if processes == 1:
            return ALONE
        raise DyditError(
            f"The run asks for {processes} processes, and this is one alone.",
            why="No launcher started it.",
            fix=f"Start it with `dydit … --processes {processes}`, or with torchrun; or leave processes at 1.",
        )
    rank, size = int(os.environ[RANK]), int(os.environ[WORLD_SIZE])
    if size != processes:
        raise DyditError(
            f"The run asks for {processes} process{'' if processes == 1 else 'es'}, and {size} were started.",
            why="The launcher's number of processes and the recipe's `processes` differ, so that one of them is not what you want.",
            fix=f"Start {processes}, or pass processes={size}.",
        )
    world = World(rank, size, int(os.environ.get(LOCAL_RANK, "0")))
    place = world.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        # Gloo as well on CUDA: flags and objects travel between CPUs.
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return replace(world, group=dist.new_group(backend="gloo", timeout=PATIENCE))


def leave() -> None:
    """Part from the other processes; without this, torch complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
