"""Tensors that are read when they are asked for: what makes a 24 GB checkpoint fit beside a browser.

Shapes and types come from a file's header; the numbers are read tensor by tensor, or a few rows at a time. Everything that
happens to a checkpoint on its way (dequantising, renaming, merging an adapter) is a mapping over another mapping, so that
nothing is computed before it is needed and nothing is kept afterwards.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor.

    Attributes:
        shape: Its sizes.
        dtype: Type of its numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Key -> tensor, read at each access and not kept. Tensors may share memory with the file: never write into one."""

    @abstractmethod
    def spec(self, key: str) -> TensorSpec:
        """Shape and type, without reading the numbers; `KeyError` where there is no such key."""

    @abstractmethod
    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` of the first axis; no more than those where the storage allows it."""

    def __contains__(self, key: object) -> bool:
        # `Mapping` would read the tensor to find out.
        try:
            self.spec(str(key))
        except KeyError:
            return False
        return True

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All shapes and types."""
        return {key: self.spec(key) for key in self}


class MemoryTensors(LazyTensors):
    """The same interface over a dictionary of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        tensor = self._tensors[key]
        return TensorSpec(tuple(tensor.shape), tensor.dtype)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        return self._tensors[key][start:stop]


def lazily(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Give any mapping of tensors the lazy interface."""
    return tensors if isinstance(tensors, LazyTensors) else MemoryTensors(tensors)
