"""Our routers and orders inside FLUX's original single file: names beside the original's blocks.

No one has published a single file with routers. The names [ours] follow those that the authors of "Dynamic Diffusion Transformer"
gave theirs in DiT's files (``attn_rate.router``, ``mlp_rate.router``, ``token_selection``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dydit_cli.checkpoints.lazy import TensorSpec

BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
# What a name begins with after its block: ours -> the file's.
PARTS = {
    "head_router.linear.": "attn_rate.router.",
    "channel_router.linear.": "mlp_rate.router.",
    "context_channel_router.linear.": "txt_mlp_rate.router.",
    "token_router.": "token_selection.",
    "attn.head_order": "attn.head_order",
    "ff.channel_order": "mlp.channel_order",
    "ff_context.channel_order": "txt_mlp.channel_order",
}
# Single blocks have their channels' order on the block itself.
SINGLE_PARTS = {**{part: PARTS[part] for part in list(PARTS)[:5]}, "channel_order": "mlp.channel_order"}


def file_key(key: str) -> str:
    """The file's name of a router's or an order's tensor.

    Raises:
        KeyError: If it has none.
    """
    block, number, rest = key.split(".", 2)
    return f"{BLOCKS[block]}.{number}.{_swapped(rest, _table(block))}"


def our_key(key: str) -> str | None:
    """Our name of a tensor in the file; None where it is no router's and no order's."""
    match = re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", key)
    if match is None:
        return None
    block = next(ours for ours, theirs in BLOCKS.items() if theirs == match[1])
    back = {theirs: ours for ours, theirs in _table(block).items()}
    try:
        return f"{block}.{match[2]}.{_swapped(match[3], back)}"
    except KeyError:
        return None


def routed_config(specs: Mapping[str, TensorSpec], num_heads: int) -> dict[str, Any]:
    """What the routers' shapes say of a model's configuration.

    Args:
        specs: Of the routers, under our names.
        num_heads: Of the model.
    """
    rows = {
        name: next((spec.shape[0] for key, spec in specs.items() if key.endswith(name)), None)
        for name in (
            ".head_router.linear.weight",
            ".channel_router.linear.weight",
            ".token_router.reduce.weight",
        )
    }
    heads, groups, rank = rows.values()
    found: dict[str, Any] = {"token_router": "authors" if rank is None else "low-rank", "token_rank": rank}
    if heads is None or groups is None:
        return found | {"width": False}
    always_on = heads == num_heads - 1
    return found | {"always_on": always_on, "num_groups": groups + int(always_on)}


def _table(block: str) -> Mapping[str, str]:
    return PARTS if block == "transformer_blocks" else SINGLE_PARTS


def _swapped(rest: str, table: Mapping[str, str]) -> str:
    for begin, other in table.items():
        if rest.startswith(begin):
            return other + rest.removeprefix(begin)
    raise KeyError(rest)
