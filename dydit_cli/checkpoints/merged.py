"""Low-rank updates merged into weights when those are read: W + scale * B A, a tensor or a few of its rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter adds to one layer.

    Attributes:
        down: A, (r, in).
        up: B, (out, r).
        scale: By which B A is multiplied, everything included.
        bias: (out,) that is added to the layer's bias with the same scale, where the adapter has one.
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None = None


class Merged(LazyTensors):
    """Tensors with updates added in fp32 and rounded once to the tensor's own type.

    Args:
        tensors: The base.
        updates: Layer (a key without ``.weight``) -> its updates, whose keys and shapes fit the base.
    """

    def __init__(self, tensors: Mapping[str, Tensor], updates: Mapping[str, Sequence[LowRankUpdate]]) -> None:
        self._base = lazily(tensors)
        self._weights = {f"{layer}.weight": tuple(parts) for layer, parts in updates.items()}
        self._biases = {
            f"{layer}.bias": tuple(part for part in parts if part.bias is not None)
            for layer, parts in updates.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        return self._with_updates(key, self._base[key], slice(None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        return self._base.spec(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        return self._with_updates(key, self._base.rows(key, start, stop), slice(start, stop))

    @torch.no_grad()
    def _with_updates(self, key: str, base: Tensor, rows: slice) -> Tensor:
        weights, biases = self._weights.get(key, ()), self._biases.get(key, ())
        if not weights and not biases:
            return base
        # A copy in any case: the base may be a view of its file.
        merged = base.to(torch.float32, copy=True)
        for part in weights:
            merged.addmm_(part.up[rows].float(), part.down.float(), alpha=part.scale)
        for part in biases:
            if part.bias is not None:
                merged.add_(part.bias[rows].float(), alpha=part.scale)
        return merged.to(base.dtype)
