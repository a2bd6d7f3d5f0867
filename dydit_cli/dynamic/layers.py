"""The two layers whose width is dynamic: parameters in the source's order, and beside them the importance order of their units.

They hold no arithmetic but that of `Sequences`: an executor (`execution/`) decides whether masks are multiplied or weights sliced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.dynamic.timed import through


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, H, T, C_h) each -> (B, H, T, C_h).

    On a CPU that trains under bf16 autocast the scores are computed in fp32: the backward pass of the fused kernel takes seven
    times as long in bf16 as in fp32 (short rows, small heads), more than all matrix products of a block together.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value)


@dataclass(frozen=True)
class WholeSequence:
    """All tokens of a sample attend to each other."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, T, C_h) each -> (B, H, T, C_h)."""
        return dot_product_attention(query, key, value)


@dataclass(frozen=True)
class WithinFrames:
    """The tokens of a video, frame after frame, attend to those of the same frame.

    Attributes:
        frames: F; T = F * N.
    """

    frames: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, T, C_h) each -> (B, H, T, C_h)."""
        # Samples and frames become one axis; their tokens follow each other in memory, so that nothing is copied.
        apart = (
            part.unflatten(2, (self.frames, -1)).transpose(1, 2).flatten(0, 1) for part in (query, key, value)
        )
        mixed: Tensor = dot_product_attention(*apart)
        return mixed.unflatten(0, (query.shape[0], self.frames)).transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True)
class AcrossFrames:
    """The tokens of a video attend to those at the same place in all frames.

    Attributes:
        frames: F; T = F * N.
    """

    frames: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, T, C_h) each -> (B, H, T, C_h)."""
        places = query.shape[2] // self.frames
        apart = (
            part.unflatten(2, (self.frames, places)).permute(0, 3, 1, 2, 4).flatten(0, 1)
            for part in (query, key, value)
        )
        mixed: Tensor = dot_product_attention(*apart)
        # Copied once, in the order in which the output projection reads.
        by_frame = mixed.unflatten(0, (query.shape[0], places)).permute(0, 3, 1, 2, 4)
        return by_frame.flatten(1, 2).transpose(1, 2)


Sequences = WholeSequence | WithinFrames | AcrossFrames
"""Which tokens of a sample attend to each other. Everything else of a block works on single tokens."""

WHOLE = WholeSequence()


class DynamicAttention(nn.Module):
    """Self-attention with a fused qkv projection, as timm and the original DiT store it.

    Args:
        hidden_size: C.
        num_heads: H; C must be a multiple of it unless ``head_dim`` is given.
        sequences: Which tokens attend to each other.
        head_dim: C_h; C/H if not given. Of a layer that was pruned, H * C_h is less than C.

    Attributes:
        head_order: (H,) int64; ``head_order[r]`` is the stored head of rank r.
    """

    head_order: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        sequences: Sequences = WHOLE,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.sequences = sequences
        self.num_heads = num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(hidden_size, 3 * inner)
        self.proj = nn.Linear(inner, hidden_size)
        self.register_buffer("head_order", torch.arange(num_heads))

    def project(self, inputs: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, 3 * H * C_h): queries, keys and values side by side."""
        return through(self.qkv, inputs, time_embedding)

    def by_source(self, mask: Tensor) -> Tensor:
        """Turn a (B, H) mask by rank into one by stored head."""
        return torch.zeros_like(mask).index_copy(1, self.head_order, mask)


class DynamicMlp(nn.Module):
    """fc1 -> GELU (tanh) -> fc2 whose hidden channels form G groups by importance.

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
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)
        self.register_buffer("channel_order", torch.arange(mlp_hidden))

    def by_source(self, mask: Tensor) -> Tensor:
        """Turn a (B, G) mask by rank into a (B, mlp_hidden) one by stored channel."""
        channels = mask.repeat_interleave(self.group_width, dim=1)
        return torch.zeros_like(channels).index_copy(1, self.channel_order, channels)
