"""The original DiT / SiT file layout, on which Latte's builds: which file is one, its geometry, and its keys.

SiT's keys and shapes are DiT's, so a file cannot say which of the two it is. The authors' dynamic DiT adds eight router tensors
a block; an older release of theirs has as many router rows as heads, and no always-on unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.families.family import Hints, Source

# Published widths and their heads; no tensor of a file tells the number of heads.
HEADS_BY_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}

# The authors' router names -> ours, inside a block.
ROUTER_NAMES = {
    "attn_rate.router": "head_router.linear",
    "mlp_rate.router": "channel_router.linear",
    "token_selection.mlp_head.0": "token_router.reduce",
    "token_selection.mlp_head.2": "token_router.score",
}
OUR_ROUTER_NAMES = {ours: theirs for theirs, ours in ROUTER_NAMES.items()}
BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)$")
BACKBONE_KEYS = (
    "x_embedder.proj.weight",
    "t_embedder.mlp.0.weight",
    "blocks.0.attn.qkv.weight",
    "final_layer.linear.weight",
)
LABEL_TABLE = "y_embedder.embedding_table.weight"
TEMPLATE_KEYS = (*BACKBONE_KEYS, LABEL_TABLE)


# How many axes the tensors have whose shapes tell the geometry.
AXES = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a DiT or SiT (a Latte has ``temp_embed`` besides)."""
    return all(key in tensors for key in TEMPLATE_KEYS) and "temp_embed" not in tensors


def has_authors_routers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file is the authors' dynamic DiT: routers under their names, and no order of units beside them (ours has)."""
    return "blocks.0.attn_rate.router.weight" in tensors and "blocks.0.attn.head_order" not in tensors


def read(tensors: Mapping[str, Tensor], hints: Hints) -> Source:
    """Infer the configuration and rename routers to our names; a file without a table of classes has none (Latte).

    Raises:
        DyditError: If the number of heads cannot be told, or tensors are missing, left over or of the wrong shape.
    """
    routers = "blocks.0.attn_rate.router.weight" in tensors
    renamed = {_our_key(key): tensor for key, tensor in tensors.items()}
    config = _geometry(tensors, hints)
    if routers:
        config |= _router_geometry(tensors, config["num_attention_heads"], hints)
    return Source(config=config, tensors=renamed, dynamic=routers)


def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our routers as the authors do; orders stay beside the layers they belong to."""
    return {_their_key(key): tensor for key, tensor in state.items()}


def _our_key(key: str) -> str:
    match = BLOCK_KEY.match(key)
    if match and match[2] in ROUTER_NAMES:
        return f"blocks.{match[1]}.{ROUTER_NAMES[match[2]]}.{match[3]}"
    return key


def _their_key(key: str) -> str:
    match = BLOCK_KEY.match(key)
    if match and match[2] in OUR_ROUTER_NAMES:
        return f"blocks.{match[1]}.{OUR_ROUTER_NAMES[match[2]]}.{match[3]}"
    return key


def _geometry(tensors: Mapping[str, Tensor], hints: Hints) -> dict[str, Any]:
    if "pos_embed" not in tensors:
        raise DyditError(
            "The checkpoint has no position table 'pos_embed'.",
            why="Its length tells the resolution; every original DiT, SiT and Latte file holds it.",
            fix="Save the model's whole state dict, buffers and frozen parameters included.",
        )
    check_axes(tensors, AXES | ({LABEL_TABLE: 2} if LABEL_TABLE in tensors else {}))
    hidden, in_channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    tokens = tensors["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise DyditError(
            f"The position table has {tokens} entries, which is no square.",
            why="The model cuts square images into a square grid of patches.",
            fix="Bring a checkpoint of a square resolution.",
        )
    computed = tensors["final_layer.linear.weight"].shape[0] // (patch * patch)
    labels = tensors.get(LABEL_TABLE)
    return {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "num_layers": depth_of(tensors),
        "num_attention_heads": heads_of(hidden, hints),
        "num_classes": labels.shape[0] - 1 if labels is not None else 0,
        "mlp_hidden_size": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "learn_sigma": computed == 2 * in_channels,
        "num_groups": hints.num_groups,
        "always_on": True,
    }


def check_axes(tensors: Mapping[str, Tensor], expected: Mapping[str, int]) -> None:
    """See that tensors are there and have as many axes as expected, none of them empty.

    Raises:
        DyditError: Naming the first that has not.
    """
    for key, axes in expected.items():
        shape = tuple(tensors[key].shape) if key in tensors else None
        if shape is None or len(shape) != axes or 0 in shape:
            raise DyditError(
                f"The tensor '{key}' of the checkpoint {f'is of shape {shape}' if shape is not None else 'is missing'}.",
                why=f"The geometry of the model is read from its {axes} axes, none of which may be empty.",
                fix="Save the state dict of the whole model again, or check --family.",
            )


def depth_of(tensors: Iterable[str], block_key: re.Pattern[str] = BLOCK_KEY) -> int:
    """The number of blocks, by the names of the tensors; the first group of ``block_key`` is a block's number.

    Raises:
        DyditError: If some are missing.
    """
    numbers = {int(match[1]) for key in tensors if (match := block_key.match(key))}
    if max(numbers) != len(numbers) - 1:
        raise DyditError(
            f"The checkpoint holds {len(numbers)} blocks, the last of which is number {max(numbers)}.",
            why="Blocks are numbered from 0 without gaps, so that some are missing.",
            fix="Save the state dict of the whole model again.",
        )
    return len(numbers)


def heads_of(hidden: int, hints: Hints) -> int:
    """The number of attention heads: as hinted, else by the published width.

    Raises:
        DyditError: If neither tells it.
    """
    heads = hints.num_heads or HEADS_BY_WIDTH.get(hidden)
    if heads is None:
        known = ", ".join(f"{width} ({count} heads)" for width, count in HEADS_BY_WIDTH.items())
        raise DyditError(
            f"The number of attention heads of a model with {hidden} channels is not known.",
            why=f"No tensor of the file tells it, and only these widths are published ones: {known}.",
            fix="Pass --num-heads N (num_heads in Python and in a recipe), as the model was trained.",
        )
    return heads


def _router_geometry(tensors: Mapping[str, Tensor], heads: int, hints: Hints) -> dict[str, Any]:
    head_rows = tensors["blocks.0.attn_rate.router.weight"].shape[0]
    group_rows = tensors["blocks.0.mlp_rate.router.weight"].shape[0]
    if head_rows not in (heads - 1, heads):
        raise DyditError(
            f"The file's head routers have {head_rows} rows, which fits {head_rows + 1} or {head_rows} heads, not {heads}.",
            why="The authors' routers have one row a head, with or without the always-on head.",
            fix=f"Pass --num-heads {head_rows + 1}, or {head_rows} for a file of the older release.",
        )
    always_on = head_rows == heads - 1
    groups = group_rows + int(always_on)
    if hints.num_groups not in (None, groups):
        raise DyditError(
            f"The file's routers are made for {groups} channel groups, not {hints.num_groups}.",
            why="Trained routers address the groups that they were trained with.",
            fix="Leave --num-groups out.",
        )
    return {"num_groups": groups, "always_on": always_on}
