"""Read the routers out of a file that holds them beside a FLUX in black-forest-labs' layout.

Of a file of 24 GB, what is read are the routers and the units' orders, some hundred megabytes at most.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import Tensor

from .problems import NodeError
from .routers import BlockRouters, Routers, Shape

OURS = re.compile(
    r"(double_blocks|single_blocks)\.(\d+)\."
    r"((?:attn_rate|mlp_rate|txt_mlp_rate|token_selection)\..+|attn\.head_order|(?:txt_)?mlp\.channel_order)"
)
FLUX_KEYS = (
    "img_in.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale",
    "double_blocks.0.img_mlp.0.weight",
)
EXPORT = "Choose a file that `dydit export --format comfyui` wrote."


def read_routers(path: str) -> Routers:
    """Read a file's routers.

    Args:
        path: Of a safetensors file.

    Raises:
        NodeError: If it is none, no FLUX, or has no routers, or not all of them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _read(file, str(path))
    except (SafetensorError, OSError) as error:
        raise NodeError(
            f"{path} cannot be read as a safetensors file.", why=f"{error}.", fix=EXPORT
        ) from error


def _read(file: Any, path: str) -> Routers:
    names = list(file.keys())
    if not set(FLUX_KEYS) <= set(names):
        raise NodeError(
            f"{path} is no FLUX in black-forest-labs' layout.",
            why="It lacks such tensors as 'double_blocks.0.img_attn.norm.key_norm.scale'.",
            fix=EXPORT,
        )
    found = {name: match for name in names if (match := OURS.fullmatch(name)) is not None}
    if not found:
        raise NodeError(
            f"{path} has no routers.",
            why="It is a static FLUX, which says nowhere what could be skipped.",
            fix=EXPORT,
        )
    tensors: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, match in found.items():
        tensors[match[1]][int(match[2])][match[3]] = file.get_tensor(name)
    hidden, head_dim, mlp = (file.get_slice(name).get_shape()[0] for name in FLUX_KEYS)
    depths = [_depth(names, kind) for kind in ("double_blocks", "single_blocks")]
    shape = Shape(hidden, hidden // head_dim, mlp, depths[0], depths[1])
    blocks = [
        BlockRouters(tensors[kind][index], shape, double=kind == "double_blocks")
        for kind, depth in zip(("double_blocks", "single_blocks"), depths, strict=True)
        for index in range(depth)
    ]
    for index, block in enumerate(blocks):
        block.check(f"block {index} of {path}", like=blocks[0])
    return Routers(shape, tuple(blocks))


def _depth(names: list[str], kind: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"{kind}.")})
