"""Magnitude: the size of what a unit can write into the residual stream. Needs no data.

Head h: ||W_v,h|| * ||W_o,h||, summed over the streams that share it; channel c: ||fc1 row c|| * ||fc2 column c||. The papers name a
magnitude criterion and give no formula; this one does not change if a scale moves from one factor to the other.
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
        streams = [
            value.float().unflatten(0, (geometry.num_heads, -1)).flatten(1).norm(dim=1)
            * output.float().unflatten(1, (geometry.num_heads, -1)).transpose(0, 1).flatten(1).norm(dim=1)
            for value, output in block.value_and_output_weights()
        ]
        heads.append(torch.stack(streams).sum(dim=0))
        channels.append(block.mlp.fc1.weight.float().norm(dim=1) * block.mlp.fc2.weight.float().norm(dim=0))
    return Importance(torch.stack(heads), torch.stack(channels), "magnitude", {})
