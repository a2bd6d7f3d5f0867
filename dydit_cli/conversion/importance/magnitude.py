"""Magnitude: the size of what a unit can write into the residual stream. Needs no data.

Head h: ||W_v,h|| * ||W_o,h||; channel c: ||fc1 row c|| * ||fc2 column c||. The papers name a magnitude criterion and give no
formula; this one does not change if a scale moves from one factor to the other.
"""

from __future__ import annotations

import torch

from dydit_cli.conversion.importance.scores import Importance
from dydit_cli.families.dynamic_model import DynamicModel


@torch.no_grad()
def magnitude(model: DynamicModel) -> Importance:
    """Score all heads and channels of ``model`` by their weights."""
    geometry = model.geometry
    heads, channels = [], []
    for block in model.dynamic_blocks:
        value = block.attn.qkv.weight.float()[2 * geometry.hidden_size :]
        value_norms = value.view(geometry.num_heads, -1).norm(dim=1)
        output = block.attn.proj.weight.float().view(-1, geometry.num_heads, geometry.head_dim)
        heads.append(value_norms * output.transpose(0, 1).flatten(1).norm(dim=1))
        channels.append(block.mlp.fc1.weight.float().norm(dim=1) * block.mlp.fc2.weight.float().norm(dim=0))
    return Importance(torch.stack(heads), torch.stack(channels), "magnitude", {})
