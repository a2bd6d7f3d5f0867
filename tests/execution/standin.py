"""A recorder for CPUs that plays back by calling again, and checks what CUDA would demand of a recorded step.

A CUDA graph is a fixed list of kernels on fixed addresses. So each call must run the same operations in the same order with the
same numbers, shapes and types, on the same memory wherever a tensor was not made by the step itself; it must not ask the device for
a value, and not bring values from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

Outputs = tuple[Tensor, ...]

FORBIDDEN = ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero", "lift_fresh", "item")


class Trace(TorchDispatchMode):
    """Notes operations with all that a CUDA graph would fix of them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[object] = []
        self._made: set[int] = set()
        # Kept, so that no address is given away twice.
        self._kept: list[Tensor] = []

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        storage = value.untyped_storage().data_ptr()
        where = "inside" if storage in self._made else value.data_ptr()
        return where, tuple(value.shape), value.stride(), value.dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, f"{name} in a recorded step"
        self.operations.append((name, repr(tree_map(self._seen, (args, kwargs or {})))))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_iter((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._kept.append(leaf)
                storage = leaf.untyped_storage().data_ptr()
                if storage not in given:
                    self._made.add(storage)
        return result


class StandInRecording:
    """A callable with the results of its first call, which later calls write to."""

    def __init__(self, compute: Callable[[], Outputs]) -> None:
        self._compute = compute
        self.outputs, self._operations = self._traced()
        self.nbytes = sum(output.numel() * output.element_size() for output in self.outputs)

    def _traced(self) -> tuple[Outputs, list[object]]:
        with Trace() as trace:
            outputs = self._compute()
        return outputs, trace.operations

    def replay(self) -> None:
        outputs, operations = self._traced()
        assert operations == self._operations
        for mine, new in zip(self.outputs, outputs, strict=True):
            mine.copy_(new)


class StandInRecorder:
    """Plays back by calling again; counts what it is asked for."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.waits = 0
        self._turn = Lock()

    def record(self, compute: Callable[[], Outputs]) -> StandInRecording:
        # Libraries warm up before.
        compute()
        return StandInRecording(compute)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        assert self._turn.acquire(blocking=False), "two at once"
        try:
            yield
        finally:
            self._turn.release()

    def wait(self) -> None:
        self.waits += 1
