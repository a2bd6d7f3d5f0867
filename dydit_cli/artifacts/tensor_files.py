"""Write safetensors files tensor by tensor: what is in memory at any time is one tensor and the header.

The header of a safetensors file says where each tensor lies, and shapes and types are known before any number is. So the header
goes first and every tensor to its place when it has been made. Shards and their index are named as diffusers names them.

Source of the format: https://github.com/huggingface/safetensors (8 bytes of length, a JSON header, the tensors without gaps).
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dydit_cli.artifacts.writing import atomic_write, write_json
from dydit_cli.checkpoints.lazy import TensorSpec
from dydit_cli.checkpoints.stored import NAMES
from dydit_cli.errors import DyditError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", re.IGNORECASE)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
WEIGHTS = "diffusion_pytorch_model"
ALIGNMENT = 8

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is yet to be made.

    Attributes:
        key: Its name in the file.
        spec: Its shape and type.
        produce: Makes it; called once, after those of all plans before it.
    """

    key: str
    spec: TensorSpec
    produce: Callable[[], Tensor]


def write_tensors(
    folder: Path,
    plans: Sequence[TensorPlan],
    *,
    max_shard_size: str | None = "5GB",
    stem: str = WEIGHTS,
    on_progress: Progress | None = None,
) -> list[str]:
    """Write tensors into ``folder`` as one file, or as shards with an index, making each when its turn comes.

    Args:
        folder: Exists already.
        plans: In the order in which they are made; shards are cut in that order.
        max_shard_size: A number and KB, MB or GB (powers of ten, as in diffusers); a larger tensor has a shard of its own. None
            for one file, whatever its size.
        stem: What the files are called.
        on_progress: Called after each tensor.

    Returns:
        The names of the weight files.

    Raises:
        DyditError: If the size is not one, or the disk is too small or refuses.
    """
    shards = [list(plans)] if max_shard_size is None else _shards(plans, shard_bytes(max_shard_size))
    total = sum(plan.spec.nbytes for plan in plans)
    _require_space(folder, total)
    names = _names(stem, len(shards))
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with atomic_write(folder / name) as temporary, temporary.open("wb") as file:
            places = write_header(file, {plan.key: plan.spec for plan in shard})
            for plan in shard:
                write_at(file, places[plan.key], _produced(plan))
                done += plan.spec.nbytes
                if on_progress is not None:
                    on_progress(done, total)
    if len(shards) > 1:
        weight_map = {plan.key: name for name, shard in zip(names, shards, strict=True) for plan in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return names


def shard_bytes(size: str) -> int:
    """Bytes of a size such as ``5GB``.

    Raises:
        DyditError: If it is none.
    """
    match = SIZE.fullmatch(size)
    if match is None:
        raise DyditError(
            f"'{size}' is not a shard size.",
            why="A number and KB, MB or GB are expected.",
            fix="Write it like 5GB.",
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def _shards(plans: Sequence[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.spec.nbytes
    return shards


def _names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _require_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < total:
        raise DyditError(
            f"The weights do not fit beside {folder}.",
            why=f"They take {total / 1e9:.2f} GB; {free / 1e9:.2f} GB are free there.",
            fix="Free space or choose another --out.",
        )


def write_header(file: BinaryIO, specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Write the header of a file of such tensors, make the file as long as it will be, and return where each begins in it.

    What is not written afterwards reads as zeros, and takes no room on a file system that knows holes.
    """
    # Wide types first, as safetensors' own writer does: every tensor then begins at a multiple of its item's size.
    ordered = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, offset = {}, 0
    for key, spec in ordered:
        end = offset + spec.nbytes
        header[key] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        places[key] = offset
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    begin = file.tell()
    file.truncate(begin + offset)
    return {key: begin + place for key, place in places.items()}


def write_at(file: BinaryIO, place: int, tensor: Tensor) -> None:
    """Write the numbers of a tensor at a place in a file, without a copy where they lie in order."""
    file.seek(place)
    file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _produced(plan: TensorPlan) -> Tensor:
    tensor = plan.produce()
    if (tuple(tensor.shape), tensor.dtype) != (plan.spec.shape, plan.spec.dtype):
        raise ValueError(
            f"{plan.key}: {tuple(tensor.shape)} {tensor.dtype} was made, {plan.spec} was announced"
        )
    return tensor
