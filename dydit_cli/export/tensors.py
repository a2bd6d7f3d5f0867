"""Weights from an artifact to an export one tensor at a time, and the comparison afterwards: a model of 24 GB is never in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.artifacts.tensor_files import WEIGHTS, TensorPlan, write_tensors
from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec
from dydit_cli.checkpoints.stored import StoredTensors, read_header
from dydit_cli.errors import DyditError


class Cast(LazyTensors):
    """Tensors whose numbers come in other types.

    Args:
        tensors: As they are stored.
        dtypes: Name of the type by key, under ``*`` that of all others; without either a tensor stays as it is. Integers stay
            integers.
    """

    def __init__(self, tensors: LazyTensors, dtypes: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._dtypes = dtypes

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].to(self.spec(key).dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        spec = self._tensors.spec(key)
        name = self._dtypes.get(key, self._dtypes.get("*"))
        if name is None or not spec.dtype.is_floating_point:
            return spec
        return TensorSpec(spec.shape, getattr(torch, name))

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        return self._tensors.rows(key, start, stop).to(self.spec(key).dtype)


def write_compared(
    folder: Path, tensors: LazyTensors, *, stem: str = WEIGHTS, max_shard_size: str | None = "5GB"
) -> None:
    """Write tensors into ``folder`` as safetensors, read them back and compare every bit.

    Args:
        folder: Exists already.
        tensors: As they are to be written.
        stem: What the files are called.
        max_shard_size: Of a file; None for one file.

    Raises:
        DyditError: If the disk is too small or refuses, or the files do not hold what was written.
    """
    plans = [TensorPlan(key, tensors.spec(key), partial(tensors.__getitem__, key)) for key in tensors]
    names = write_tensors(folder, plans, stem=stem, max_shard_size=max_shard_size)
    files = {key: folder / name for name in names for key in read_header(folder / name)}
    found = StoredTensors(files)
    if set(found) == set(tensors) and all(_same(found[key], tensors[key]) for key in tensors):
        return
    raise DyditError(
        f"{names[0]} does not hold what was written to it.",
        why="Reading it back gave other tensors: the disk or the memory is faulty.",
        fix="Nothing was left behind; check the disk and export again.",
    )


def commonest_dtype(tensors: LazyTensors) -> str:
    """Name of the type that most numbers have."""
    counted: dict[torch.dtype, int] = {}
    for spec in tensors.specs.values():
        if spec.dtype.is_floating_point:
            counted[spec.dtype] = counted.get(spec.dtype, 0) + spec.numel
    return str(max(counted, key=lambda dtype: counted[dtype])).removeprefix("torch.")


def _same(found: Tensor, meant: Tensor) -> bool:
    return (
        found.dtype == meant.dtype and found.shape == meant.shape and torch.equal(_bits(found), _bits(meant))
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
