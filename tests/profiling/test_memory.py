"""Bytes of the tensors alive at once."""

from __future__ import annotations

import torch

from dydit_cli.profiling.memory import MemoryUse, measure_memory

CPU = torch.device("cpu")
BYTES = 1000 * 4


def new() -> torch.Tensor:
    """A tensor of `BYTES`, made by an operation."""
    return torch.ones(1000) * 2


def test_a_chain_holds_two_at_a_time() -> None:
    given = torch.ones(1000)
    assert measure_memory(lambda: ((given + 1) * 2) + 1, CPU) == MemoryUse(peak=2 * BYTES, retained=0)


def test_what_is_there_before_does_not_count() -> None:
    given = torch.ones(1000)
    assert measure_memory(lambda: given.view(10, 100).t(), CPU) == MemoryUse(0, 0)
    assert measure_memory(lambda: given.add_(1), CPU) == MemoryUse(0, 0)


def test_views_count_once() -> None:
    given = torch.ones(1000)
    assert measure_memory(lambda: [(given + 1).view(10, 100), 0], CPU).peak == BYTES
    assert measure_memory(lambda: (given + 1).chunk(5), CPU).peak == BYTES


def test_what_is_kept_is_retained() -> None:
    kept: list[torch.Tensor] = []
    given = torch.ones(1000)
    use = measure_memory(lambda: kept.append((given + 1)[:1].clone()), CPU)
    assert use == MemoryUse(peak=BYTES + 4, retained=4)


def test_everything_alive_at_once_adds_up() -> None:
    assert measure_memory(lambda: [new() for _ in range(3)], CPU).peak >= 3 * BYTES
