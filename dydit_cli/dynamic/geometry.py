"""The numbers that routing and cost counting need of a transformer, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from dydit_cli.dynamic.costs import (
    LAYERNORM_MACS,
    BlockCost,
    PrunedBlockCost,
    SequentialBlockCost,
    Surroundings,
)

FREQUENCIES = 256
"""Sinusoids of the timestep."""
TOKEN_ROUTER_REDUCTION = 16


@dataclass(frozen=True)
class Geometry:
    """Shape of an image transformer with dynamic blocks.

    Attributes:
        hidden_size: C, channels of the residual stream.
        depth: L, number of blocks.
        num_heads: H, attention heads; each has ``head_dim`` = C/H channels.
        num_groups: G, channel groups of the MLP; each has ``group_width`` = mlp_hidden/G channels.
        mlp_hidden: Hidden channels of the MLP (4C in the published models).
        num_tokens: N, tokens of one image, or of all frames of one video.
        patch_size: Side of a patch in latent pixels.
        in_channels: Channels of the model's input.
        out_channels: Channels that the final layer computes (2 * in_channels when it learned sigma).
        sample_size: Side of the (square) input in latent pixels.
        num_classes: Classes without the null class.
        always_on: Whether the first head and group have no router row.
        num_frames: F of a video model; 0 for images, which have no axis of frames.
        ordered_width: Whether width routers decide how many units are on, not which.
        width_macs: Of a block's two width routers, where they are not the package's own.
        block_heads: Of a pruned model, the heads that each block is left with; it has no routers. ``num_heads``, ``num_groups`` and
            ``mlp_hidden`` are those of the model that it was cut from.
        block_hidden: Of a pruned model, the hidden channels that each block's MLP is left with.
    """

    hidden_size: int
    depth: int
    num_heads: int
    num_groups: int
    mlp_hidden: int
    num_tokens: int
    patch_size: int
    in_channels: int
    out_channels: int
    sample_size: int
    num_classes: int
    always_on: bool = True
    num_frames: int = 0
    ordered_width: bool = False
    width_macs: float | None = None
    block_heads: tuple[int, ...] | None = None
    block_hidden: tuple[int, ...] | None = None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input: (C_in, h, w), or (F, C_in, h, w) of a video."""
        image = (self.in_channels, self.sample_size, self.sample_size)
        return (self.num_frames, *image) if self.num_frames else image

    @property
    def is_pruned(self) -> bool:
        """Whether blocks have widths of their own, and no routers."""
        return self.block_heads is not None

    @property
    def has_context(self) -> bool:
        """Whether some blocks have an MLP of their own for a text stream."""
        return False

    def with_tokens(self, count: int) -> Self:
        """The geometry of a sample with ``count`` routed tokens, in families that take samples of any size."""
        return self

    def attention_length(self, block: int) -> int:
        """Tokens that attend to each other in block number ``block``: all of an image's; in a video, blocks with an even number
        attend inside a frame, the others along the frames at a place.
        """
        if not self.num_frames:
            return self.num_tokens
        return self.num_frames if block % 2 else self.num_tokens // self.num_frames

    def block_costs(self) -> tuple[BlockCost, ...]:
        """What each block costs; see `dynamic/costs.py`."""
        if self.block_heads is not None and self.block_hidden is not None:
            return tuple(
                PrunedBlockCost(
                    self.num_tokens,
                    self.attention_length(block),
                    self.hidden_size,
                    heads * self.head_dim,
                    hidden,
                )
                for block, (heads, hidden) in enumerate(zip(self.block_heads, self.block_hidden, strict=True))
            )
        return tuple(
            SequentialBlockCost(
                self.num_tokens, self.attention_length(block), self.hidden_size, self.mlp_hidden
            )
            for block in range(self.depth)
        )

    def block_router_macs(self) -> tuple[float, ...]:
        """MACs of each block's three routers, for one sample; 0 for a pruned model, which has none."""
        if self.is_pruned:
            return (0.0,) * self.depth
        inner = max(1, self.hidden_size // TOKEN_ROUTER_REDUCTION)
        rows = self.num_heads + self.num_groups + 2 * (int(self.ordered_width) - int(self.always_on))
        of_width = self.hidden_size * rows if self.width_macs is None else self.width_macs
        macs = float(of_width + self.num_tokens * (self.hidden_size * inner + inner))
        return (macs,) * self.depth

    def surrounding_macs(self, kept: Sequence[float]) -> Surroundings:
        """MACs outside attention, MLPs and routers, for one sample; ``kept`` is the share of tokens that each MLP sees."""
        channels, tokens, patch_area = self.hidden_size, self.num_tokens, self.patch_size**2
        norms = sum(1 + share for share in kept) + 1
        return Surroundings(
            embeddings=float(
                tokens * patch_area * self.in_channels * channels + FREQUENCIES * channels + channels**2
            ),
            modulation=float((6 * self.depth + 2) * channels**2),
            final=float(tokens * channels * patch_area * self.out_channels),
            layernorm=LAYERNORM_MACS * tokens * channels * norms,
        )

    @property
    def head_dim(self) -> int:
        """C_h, channels of one head."""
        return self.hidden_size // self.num_heads

    @property
    def group_width(self) -> int:
        """Hidden channels of one MLP group."""
        return self.mlp_hidden // self.num_groups
