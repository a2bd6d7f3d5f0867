"""Cut whole heads and hidden channels out of a model of DiT's form, for good: what is left is a static model of pruned blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dydit_cli.families.dynamic_model import DynamicModel


@torch.no_grad()
def cut_model(
    model_class: type[DynamicModel],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    heads: Sequence[Tensor],
    channels: Sequence[Tensor],
) -> DynamicModel:
    """The static model that is left, in eval mode: rows and columns of the other units are gone.

    Args:
        model_class: Of a family with pruned blocks.
        config: Of the complete model, without routers.
        tensors: Its weights under our keys, without routers and orders.
        heads: Numbers of the stored heads that stay, by block.
        channels: Numbers of the stored hidden channels that stay, by block.
    """
    widths = {"block_heads": list(map(len, heads)), "block_hidden": list(map(len, channels))}
    model = model_class(**{**config, **widths})
    state = dict(tensors)
    for block, (of_attention, of_mlp) in enumerate(zip(heads, channels, strict=True)):
        state |= _cut(state, f"blocks.{block}.", of_attention, of_mlp, model.geometry.head_dim)
    orders = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_order")}
    # Assigned, not copied: they keep their type.
    model.load_state_dict(state | orders, assign=True)
    return model.eval()


def _cut(
    state: Mapping[str, Tensor], prefix: str, heads: Tensor, channels: Tensor, head_dim: int
) -> dict[str, Tensor]:
    """What is left of a block's weights, by key."""
    inner = (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
    width = state[f"{prefix}attn.proj.weight"].shape[1]
    rows = torch.cat([inner + part * width for part in range(3)])
    return {
        f"{prefix}attn.qkv.weight": state[f"{prefix}attn.qkv.weight"][rows],
        f"{prefix}attn.qkv.bias": state[f"{prefix}attn.qkv.bias"][rows],
        f"{prefix}attn.proj.weight": state[f"{prefix}attn.proj.weight"][:, inner],
        f"{prefix}mlp.fc1.weight": state[f"{prefix}mlp.fc1.weight"][channels],
        f"{prefix}mlp.fc1.bias": state[f"{prefix}mlp.fc1.bias"][channels],
        f"{prefix}mlp.fc2.weight": state[f"{prefix}mlp.fc2.weight"][:, channels],
    }
