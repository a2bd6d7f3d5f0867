"""Which tensors of a file a family uses: found by letting it read tensors that have shapes and no numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec
from dydit_cli.inspection.report import KeyGroup

NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")


class Witnessed(LazyTensors):
    """The shapes of other tensors, and a list of the keys whose numbers were asked for.

    Args:
        tensors: None of which is read.
    """

    def __init__(self, tensors: LazyTensors) -> None:
        self._tensors = tensors
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        spec = self._tensors.spec(key)
        self.used.add(key)
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        return self._tensors.spec(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        return self[key][start:stop]


def grouped(keys: Iterable[str], why: str = "") -> tuple[KeyGroup, ...]:
    """Keys that differ in the numbers of blocks alone, as one line."""
    counted = Counter(NUMBER.sub("*", key) for key in keys)
    return tuple(KeyGroup(pattern, count, why) for pattern, count in counted.items())


def dtypes_of(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Type of numbers -> how many numbers are of it, the commonest first."""
    counted: Counter[str] = Counter()
    for spec in specs:
        counted[str(spec.dtype).removeprefix("torch.")] += spec.numel
    return dict(counted.most_common())
