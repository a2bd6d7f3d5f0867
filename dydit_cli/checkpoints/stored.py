"""Safetensors files as lazy tensors: one file or several shards, mapped into memory and read where they are touched.

Mapped pages belong to the file: the system drops them when it needs room, so that they are not counted against a process's own
(anonymous) memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dydit_cli.checkpoints.damage import unreadable
from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec
from dydit_cli.errors import DyditError

# The names of types in safetensors' headers.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensors(LazyTensors):
    """Tensors in safetensors files.

    Args:
        files: Key -> the file that holds it.

    Raises:
        DyditError: If a file is damaged, or does not hold what it should.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._open = {path: _open(path) for path in dict.fromkeys(self._files.values())}
        held = {path: set(file.keys()) for path, file in self._open.items()}
        for key, path in self._files.items():
            if key not in held[path]:
                raise DyditError(
                    f"The shard {path} does not hold '{key}'.",
                    why="The index beside it says that it does: the shards are of another saving than the index.",
                    fix="Copy the folder again from its source.",
                )
        self._specs: dict[str, TensorSpec] = {}

    def __getitem__(self, key: str) -> Tensor:
        path = self._files[key]
        try:
            tensor: Tensor = self._open[path].get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(path, error) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        if key not in self._specs:
            path = self._files[key]
            described = self._open[path].get_slice(key)
            name = described.get_dtype()
            if name not in DTYPES:
                raise DyditError(
                    f"The tensor '{key}' of {path} is of type {name}.",
                    why=f"The types that dydit reads are {', '.join(DTYPES)}.",
                    fix="Bring the bf16, fp16 or fp8 file of the model.",
                )
            self._specs[key] = TensorSpec(tuple(described.get_shape()), DTYPES[name])
        return self._specs[key]

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        # A view of the mapped file: only the rows that are used are read.
        return self[key][start:stop]


def read_header(path: Path) -> StoredTensors:
    """Open one safetensors file.

    Raises:
        DyditError: If it is damaged.
    """
    return StoredTensors(dict.fromkeys(_keys(path), path))


def read_index(index: Path) -> StoredTensors:
    """Open the shards that a ``*.safetensors.index.json`` names.

    Raises:
        DyditError: If the index is none, or shards are missing or damaged.
    """
    shards = shards_of(index)
    return StoredTensors({key: index.parent / name for key, name in shards.items()})


def shards_of(index: Path) -> dict[str, str]:
    """Key -> name of the shard beside ``index`` that holds it.

    Raises:
        DyditError: If the index is none, or shards are missing.
    """
    try:
        weight_map: dict[Any, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # Names alone: an index from a stranger must not lead out of its folder.
        shards = {str(key): Path(str(name)).name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DyditError(
            f"{index} is not a shard index.",
            why=f"It has no readable 'weight_map' ({type(error).__name__}).",
            fix="Copy the folder again from its source.",
        ) from error
    names = sorted(set(shards.values()))
    for name in names:
        if not (index.parent / name).exists():
            raise DyditError(
                f"The shard {index.parent / name} is missing.",
                why=f"{index.name} names {len(names)} shards: {', '.join(names)}.",
                fix="Copy the missing file beside the others.",
            )
    return shards


def _keys(path: Path) -> list[str]:
    return list(_open(path).keys())


def _open(path: Path) -> Any:
    try:
        # Never closed by hand: tensors that were handed out are views of the mapping, which lives as long as they do.
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error
