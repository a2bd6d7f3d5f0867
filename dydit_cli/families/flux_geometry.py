"""The numbers of a FLUX model: tokens of image and text, blocks of two kinds, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from dydit_cli.dynamic.costs import (
    LAYERNORM_MACS,
    BlockCost,
    DoubleBlockCost,
    SingleBlockCost,
    Surroundings,
)
from dydit_cli.dynamic.geometry import FREQUENCIES, Geometry
from dydit_cli.dynamic.stream_routers import FullTokenRouter, LowRankTokenRouter

PATCH = 2
"""Latent pixels on a side of a token: FLUX packs 2x2 patches into channels."""


@dataclass(frozen=True, kw_only=True)
class FluxGeometry(Geometry):
    """Shape of a FLUX model, and of the samples that are counted.

    A model takes images and prompts of any size; ``sample_size``, ``num_tokens`` and ``text_tokens`` are those of its reference
    resolution (FLUX: 1024 px and 512 tokens) until `at` gives others.

    Attributes:
        num_double: Blocks that keep the streams apart; they come first.
        text_tokens: T.
        joint_size: Width of the prompt's embeddings.
        pooled_size: Width of the pooled embedding.
        packed_channels: Channels of a token at the input: 4 * in_channels, and those of further latents beside it.
        guidance: Whether a guidance scale is embedded.
        routed_width: Whether heads and groups are routed.
        full_token_router: Whether the token routers are the authors'.
        token_rank: Rank of ours; None means the usual one.
    """

    num_double: int
    text_tokens: int
    joint_size: int
    pooled_size: int
    packed_channels: int
    guidance: bool
    routed_width: bool = True
    full_token_router: bool = False
    token_rank: int | None = None

    @property
    def num_single(self) -> int:
        """Blocks that join the streams."""
        return self.depth - self.num_double

    @property
    def extra_channels(self) -> int:
        """Channels of the latents that are packed beside the sample (FLUX Fill: mask and masked image)."""
        return self.packed_channels // PATCH**2 - self.in_channels

    @property
    def pipeline_class(self) -> str:
        """Name of diffusers' pipeline that drives such a model. Kontext is built like dev: nothing here tells it."""
        return pipeline_for(self.packed_channels, self.in_channels * PATCH**2)

    @property
    def has_context(self) -> bool:
        """See `Geometry`."""
        return True

    def at(self, height: int, width: int, text_tokens: int) -> Self:
        """The geometry of samples of ``height`` x ``width`` latent pixels with prompts of ``text_tokens``."""
        tokens = (height // PATCH) * (width // PATCH)
        return replace(self, num_tokens=tokens, text_tokens=text_tokens)

    def with_tokens(self, count: int) -> Self:
        """See `Geometry`."""
        return self if count == self.num_tokens else replace(self, num_tokens=count)

    def attention_length(self, block: int) -> int:
        """Tokens that attend to each other: all, of both streams."""
        return self.num_tokens + self.text_tokens

    def block_costs(self) -> tuple[BlockCost, ...]:
        """What each block costs; see `dynamic/costs.py`."""
        numbers = (self.num_tokens, self.text_tokens, self.hidden_size, self.mlp_hidden, self.routed_width)
        double, single = DoubleBlockCost(*numbers), SingleBlockCost(*numbers)
        return (double,) * self.num_double + (single,) * self.num_single

    def block_router_macs(self) -> tuple[float, ...]:
        """MACs of each block's routers, for one sample."""
        if self.full_token_router:
            tokens = FullTokenRouter.macs(self.hidden_size, self.num_tokens)
        else:
            tokens = LowRankTokenRouter.macs(self.hidden_size, self.token_rank, self.num_tokens)
        beside = int(self.ordered_width) - int(self.always_on)
        heads, groups = self.num_heads + beside, self.num_groups + beside
        width = self.hidden_size if self.routed_width else 0
        double, single = tokens + width * (heads + 2 * groups), tokens + width * (heads + groups)
        return (double,) * self.num_double + (single,) * self.num_single

    def surrounding_macs(self, kept: Sequence[float]) -> Surroundings:
        """MACs outside attention, MLPs and routers, for one sample.

        In a double block the share of kept tokens spares the LayerNorm before the MLP; in a single block all tokens are
        normalised, because all are keys and values.
        """
        channels, image, text = self.hidden_size, self.num_tokens, self.text_tokens
        embedders = 1 + int(self.guidance)
        norms = sum(image * (1 + share) + 2 * text for share in kept[: self.num_double])
        norms += self.num_single * (image + text) + image
        return Surroundings(
            embeddings=float(
                image * self.packed_channels * channels
                + text * self.joint_size * channels
                + embedders * (FREQUENCIES * channels + channels**2)
                + self.pooled_size * channels
                + channels**2
            ),
            modulation=float((12 * self.num_double + 3 * self.num_single + 2) * channels**2),
            final=float(image * channels * PATCH**2 * self.out_channels),
            layernorm=LAYERNORM_MACS * channels * norms,
        )


def pipeline_for(in_channels: int, out_channels: int) -> str:
    """Name of diffusers' pipeline for a model of as many channels a token, taken and predicted."""
    if in_channels == out_channels:
        return "FluxPipeline"
    return "FluxControlPipeline" if in_channels == 2 * out_channels else "FluxFillPipeline"
