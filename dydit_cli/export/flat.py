"""One flat file in the layout that the source had: with routers (`original`), or without anything of ours (`static`).

Both work on the stored tensors; no model is built, so nothing can be rounded on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.artifacts import writing
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError

ORDERS = (".attn.head_order", ".mlp.channel_order")
ROUTERS = (".head_router.", ".channel_router.", ".token_router.")
FILES = {"torch": "model.pt", "safetensors": "model.safetensors"}


def is_order(key: str) -> bool:
    """Whether a key is the importance order of a layer's units."""
    return key.endswith(ORDERS)


def is_router(key: str) -> bool:
    """Whether a key is a router's, or of what stands in its place, under our names."""
    return key.startswith(("budget_router.", "baked_widths.")) or any(part in key for part in ROUTERS)


def without_identity_orders(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the orders that say nothing: rank r is unit r, as in the authors' files."""
    return {key: tensor for key, tensor in tensors.items() if not (is_order(key) and _is_identity(tensor))}


def static_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's own keys: no routers, no orders. The store keeps the source's unit order, so nothing has to be moved."""
    return {key: tensor for key, tensor in tensors.items() if not (is_order(key) or is_router(key))}


def cast(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """Give floating tensors the dtype that ``dtypes`` names for their key, or under ``*``; without either they stay as they are."""
    result = {}
    for key, tensor in tensors.items():
        name = dtypes.get(key, dtypes.get("*"))
        wanted = getattr(torch, name) if name and tensor.is_floating_point() else tensor.dtype
        result[key] = tensor.to(wanted)
    return result


def write_flat(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a flat dictionary of tensors as ``.pt`` or ``.safetensors``, and read it back to see that it is whole.

    Raises:
        DyditError: If the disk refuses, or the file does not hold what was written.
    """
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with writing(path):
        if path.suffix == ".safetensors":
            save_file(whole, str(path), metadata={"format": "pt"})
        else:
            torch.save(whole, path)
    found = read_checkpoint(path).tensors
    if found.keys() != whole.keys() or not all(_same(found[key], tensor) for key, tensor in whole.items()):
        raise DyditError(
            f"{path.name} does not hold what was written to it.",
            why="Reading it back gave other tensors: the disk or the memory is faulty.",
            fix="Nothing was left behind; check the disk and export again.",
        )


def _same(found: Tensor, meant: Tensor) -> bool:
    return found.dtype == meant.dtype and torch.equal(found, meant)


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), dtype=order.dtype))
