"""The numbers that routing and cost counting need of a transformer, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Shape of an image transformer with dynamic blocks.

    Attributes:
        hidden_size: C, channels of the residual stream.
        depth: L, number of blocks.
        num_heads: H, attention heads; each has ``head_dim`` = C/H channels.
        num_groups: G, channel groups of the MLP; each has ``group_width`` = mlp_hidden/G channels.
        mlp_hidden: Hidden channels of the MLP (4C in the published models).
        num_tokens: N, tokens of one image.
        patch_size: Side of a patch in latent pixels.
        in_channels: Channels of the model's input.
        out_channels: Channels that the final layer computes (2 * in_channels when it learned sigma).
        sample_size: Side of the (square) input in latent pixels.
        num_classes: Classes without the null class.
        always_on: Whether the first head and group have no router row.
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

    @property
    def head_dim(self) -> int:
        """C_h, channels of one head."""
        return self.hidden_size // self.num_heads

    @property
    def group_width(self) -> int:
        """Hidden channels of one MLP group."""
        return self.mlp_hidden // self.num_groups
