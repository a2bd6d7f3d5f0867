"""Dynamic layers under diffusers' names: projections of queries, keys and values apart, and a feed-forward of two linear layers.

They answer to the names of `DynamicAttention` and `DynamicMlp` (`qkv`, `proj`, `fc1`, `fc2`), so that executors and rankings treat
them alike; files and adapters find diffusers' keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.layers import AcrossFrames, Sequences, WithinFrames
from dydit_cli.dynamic.timed import through
from dydit_cli.execution.units import UnitLayers, unit_layers


@dataclass(frozen=True)
class InsideFrames:
    """`WithinFrames` for videos of any number of frames of one size.

    Attributes:
        places: N, tokens of a frame.
    """

    places: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, F * N, C_h) each -> (B, H, F * N, C_h)."""
        return WithinFrames(query.shape[2] // self.places).attend(query, key, value)


@dataclass(frozen=True)
class AlongFrames:
    """`AcrossFrames` for videos of any number of frames of one size.

    Attributes:
        places: N, tokens of a frame.
    """

    places: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, F * N, C_h) each -> (B, H, F * N, C_h)."""
        return AcrossFrames(query.shape[2] // self.places).attend(query, key, value)


class SplitAttention(nn.Module):
    """Self-attention with diffusers' keys ``to_q``, ``to_k``, ``to_v`` and ``to_out.0``.

    Args:
        hidden_size: C.
        num_heads: H; divides C.
        sequences: Which tokens attend to each other.
        bias: Whether queries, keys and values have a bias.

    Attributes:
        head_order: (H,) int64; ``head_order[r]`` is the stored head of rank r.
    """

    head_order: Tensor

    def __init__(
        self, hidden_size: int, num_heads: int, sequences: Sequences | InsideFrames | AlongFrames, bias: bool
    ) -> None:
        super().__init__()
        self.sequences = sequences
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_v = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        self.register_buffer("head_order", torch.arange(num_heads))

    def project(self, inputs: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, 3C): queries, keys and values side by side."""
        layers = (self.to_q, self.to_k, self.to_v)
        return torch.cat([through(layer, inputs, time_embedding) for layer in layers], dim=-1)

    @property
    def proj(self) -> nn.Module:
        """The output projection."""
        return self.to_out[0]

    def by_source(self, mask: Tensor) -> Tensor:
        """Turn a (B, H) mask by rank into one by stored head."""
        return torch.zeros_like(mask).index_copy(1, self.head_order, mask)


class SplitMlp(nn.Module):
    """fc1 -> GELU (tanh) -> fc2 with diffusers' keys ``net.0.proj`` and ``net.2``.

    Args:
        hidden_size: C.
        mlp_hidden: Hidden channels; a multiple of ``num_groups``.
        num_groups: G.

    Attributes:
        channel_order: (mlp_hidden,) int64; group g holds the stored channels ``channel_order[g * width : (g + 1) * width]``.
    """

    channel_order: Tensor

    def __init__(self, hidden_size: int, mlp_hidden: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.group_width = mlp_hidden // num_groups
        entry = nn.ModuleDict({"proj": nn.Linear(hidden_size, mlp_hidden)})
        # Number 1 is diffusers' dropout, which has no weights and is 0 in every published model.
        self.net = nn.ModuleList([entry, nn.Identity(), nn.Linear(mlp_hidden, hidden_size)])
        self.register_buffer("channel_order", torch.arange(mlp_hidden))

    @property
    def fc1(self) -> nn.Module:
        """The layer that opens."""
        return self.net.get_submodule("0.proj")

    @property
    def fc2(self) -> nn.Module:
        """The layer that closes."""
        return self.net[2]

    def by_source(self, mask: Tensor) -> Tensor:
        """Turn a (B, G) mask by rank into a (B, mlp_hidden) one by stored channel."""
        channels = mask.repeat_interleave(self.group_width, dim=1)
        return torch.zeros_like(channels).index_copy(1, self.channel_order, channels)


@unit_layers.register
def units_of_split_attention(attention: SplitAttention) -> UnitLayers:
    """Heads, whose queries, keys and values stand in layers of their own."""
    layers = (attention.to_q, attention.to_k, attention.to_v)
    return UnitLayers(attention.num_heads, attention.head_order, layers, attention.proj)


@unit_layers.register
def units_of_split_mlp(mlp: SplitMlp) -> UnitLayers:
    """Groups of channels."""
    return UnitLayers(mlp.num_groups, mlp.channel_order, (mlp.fc1,), mlp.fc2)
