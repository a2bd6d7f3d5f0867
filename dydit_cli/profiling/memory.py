"""Peak memory of a forward pass.

On CUDA the allocator knows. On a CPU nothing that is always there does: the resident size of a process never falls, and Python's own
tracer does not see tensors. So the tensors that a pass makes are followed there from birth to death and their bytes summed. That
leaves out what a kernel takes for itself, and is the same number on every machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class MemoryUse:
    """Bytes beside what was there before.

    Attributes:
        peak: The most at any time.
        retained: What is still held afterwards, such as weights that were packed at first use.
    """

    peak: int
    retained: int


def measure_memory(run: Callable[[], object], device: torch.device) -> MemoryUse:
    """Run once and say how much memory that took; the result of ``run`` does not count as retained."""
    if device.type == "cuda":
        return _cuda_memory(run, device)
    tracker = _LiveTensors()
    with tracker:
        result = run()
    del result
    return MemoryUse(tracker.peak, tracker.live)


def _cuda_memory(run: Callable[[], object], device: torch.device) -> MemoryUse:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    del result
    peak = torch.cuda.max_memory_allocated(device)
    return MemoryUse(peak - before, torch.cuda.memory_allocated(device) - before)


class _LiveTensors(TorchDispatchMode):
    """Follows the storages that operations create until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._followed: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_pointer(leaf) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_iter(result):
            # A view or an in-place result has the storage of an argument, which was there before.
            if isinstance(leaf, Tensor) and _pointer(leaf) not in given:
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._followed or size == 0:
            return
        self._followed[pointer] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        # What outlives the process needs no bookkeeping at its end.
        weakref.finalize(storage, self._freed, pointer).atexit = False

    def _freed(self, pointer: int) -> None:
        self.live -= self._followed.pop(pointer)


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
