"""The numbers of the text-to-video Latte: spatial and temporal blocks in turn, and cross-attention that stays static."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dydit_cli.dynamic.costs import LAYERNORM_MACS, Surroundings
from dydit_cli.dynamic.geometry import FREQUENCIES, Geometry


@dataclass(frozen=True)
class LatteT2VGeometry(Geometry):
    """Shape of a text-to-video Latte; ``depth`` counts spatial and temporal blocks, which take turns.

    Attributes:
        text_tokens: L, tokens of a prompt that costs are counted with.
        caption_channels: Channels of prompt embeddings.
    """

    text_tokens: int = 120
    caption_channels: int = 4096

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C_in, F, h, w): diffusers' order of the axes."""
        return (self.in_channels, self.num_frames, self.sample_size, self.sample_size)

    def surrounding_macs(self, kept: Sequence[float]) -> Surroundings:
        """See `CostedGeometry`. One adaLN layer serves all blocks, and the prompt is projected once for all frames of a video."""
        channels, tokens, text, patch_area = (
            self.hidden_size,
            self.num_tokens,
            self.text_tokens,
            self.patch_size**2,
        )
        patches = tokens * patch_area * self.in_channels * channels
        time = FREQUENCIES * channels + channels**2
        prompt = text * (self.caption_channels * channels + channels**2)
        cross_attention = 2 * (tokens + text) * channels**2 + 2 * tokens * text * channels
        norms = sum(1 + share for share in kept) + 1
        return Surroundings(
            embeddings=float(patches + time + prompt),
            modulation=float(6 * channels**2),
            final=float(tokens * channels * patch_area * self.out_channels),
            layernorm=LAYERNORM_MACS * tokens * channels * norms,
            cross_attention=float(self.depth // 2 * cross_attention),
        )
