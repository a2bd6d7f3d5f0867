"""Key maps between layouts as data: each tensor of the new layout is rows of tensors of the old one, one after the other.

Splitting a fused projection, fusing three, swapping two halves and renaming are all that FLUX's layouts differ in, and all are of
this form. As data, a map can be inverted by another map, checked, priced without reading, and read a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily
from dydit_cli.errors import DyditError


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` of the first axis of a source tensor; the whole tensor by default."""

    key: str
    start: int = 0
    stop: int | None = None


Layout = Mapping[str, tuple[Rows, ...]]
"""New key -> the rows that make it, in order."""


class Rearranged(LazyTensors):
    """Tensors in another layout, made when asked for.

    Args:
        tensors: In the old layout.
        layout: What the new layout's tensors are made of.

    Raises:
        DyditError: If a source tensor is missing or has fewer rows than are asked of it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        self._source = lazily(tensors)
        self._layout = layout
        self._specs = {key: self._spec_of(key, parts) for key, parts in layout.items()}

    def __getitem__(self, key: str) -> Tensor:
        parts = self._layout[key]
        if len(parts) == 1:
            return self._read(parts[0])
        return torch.cat([self._read(part) for part in parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        return self._specs[key]

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        stop = min(stop, self._specs[key].shape[0])
        pieces, offset = [], 0
        for part in self._layout[key]:
            first, last = self._bounds(part)
            low, high = max(start - offset, 0), min(stop - offset, last - first)
            if low < high:
                pieces.append(self._source.rows(part.key, first + low, first + high))
            offset += last - first
        if not pieces:
            return self._source.rows(self._layout[key][0].key, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, part: Rows) -> Tensor:
        if part.start == 0 and part.stop is None:
            return self._source[part.key]
        return self._source.rows(part.key, *self._bounds(part))

    def _bounds(self, part: Rows) -> tuple[int, int]:
        return part.start, self._source.spec(part.key).shape[0] if part.stop is None else part.stop

    def _spec_of(self, key: str, parts: tuple[Rows, ...]) -> TensorSpec:
        missing = [part.key for part in parts if part.key not in self._source]
        if missing:
            raise DyditError(
                f"The checkpoint has no tensor '{missing[0]}'.",
                why=f"'{key}' is made of it.",
                fix="Save the state dict of the whole model again.",
            )
        first = self._source.spec(parts[0].key)
        if len(parts) == 1 and parts[0].start == 0 and parts[0].stop is None:
            return first
        rows = 0
        for part in parts:
            spec, (start, stop) = self._source.spec(part.key), self._bounds(part)
            if not spec.shape or spec.shape[0] < stop or spec.shape[1:] != first.shape[1:]:
                raise DyditError(
                    f"The tensor '{part.key}' of the checkpoint is of shape {spec.shape}.",
                    why=f"'{key}' is made of its rows {start} to {stop}"
                    + (
                        "."
                        if part.key == parts[0].key
                        else f", beside '{parts[0].key}' of shape {first.shape}."
                    ),
                    fix="Save the state dict of the whole model again.",
                )
            rows += stop - start
        return TensorSpec((rows, *first.shape[1:]), first.dtype)
