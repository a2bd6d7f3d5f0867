"""What executors need of blocks with an image stream and a text stream (FLUX), and the arithmetic that they share.

A *double* block keeps the streams apart: joint attention, then an MLP for each; a skipped image token misses its MLP. A *single*
block joins them, and attention and MLP run side by side; a skipped image token misses the whole update and is a key and a value
only. Text is never skipped. A head is one head of both streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.timed import through
from dydit_cli.execution.interface import BlockWidth, RoutedBlock
from dydit_cli.execution.units import SlicedLayer

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding, each (S, C_h) or (B, S, C_h), of text and then image positions."""

Decided = tuple[Tensor, Tensor, Tensor]
"""(B, N, C) image tokens, (B, T, C) text tokens, (B, N) mask of the image tokens that were not skipped."""

HALF_LIMIT = 65504.0
"""The largest fp16 number, where diffusers clips what leaves a block."""


class StreamTokenRouter(Protocol):
    """Decides the image tokens of a block."""

    def __call__(self, image: Tensor, text: Tensor, conditioning: Tensor) -> Tensor:
        """(B, N, C), (B, T, C), (B, C) -> (B, N) fp32 logits."""
        ...


class StreamBlock(RoutedBlock, Protocol):
    """What both kinds have: diffusers' layers, and how its attention is computed."""

    attn: Any
    token_router: StreamTokenRouter

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, K, H, C_h), twice (B, S, H, C_h) -> (B, K, H, C_h)."""
        ...


class DoubleBlock(StreamBlock, Protocol):
    """Diffusers' `FluxTransformerBlock` with routers."""

    norm1: nn.Module
    norm1_context: nn.Module
    norm2: nn.Module
    norm2_context: nn.Module
    ff: Any
    ff_context: Any
    image_heads: SlicedLayer
    text_heads: SlicedLayer
    image_channels: SlicedLayer
    text_channels: SlicedLayer

    def complete_forward(
        self, image: Tensor, text: Tensor, conditioning: Tensor, rope: Rope, keywords: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """Diffusers' own forward -> text and image."""
        ...


class SingleBlock(StreamBlock, Protocol):
    """Diffusers' `FluxSingleTransformerBlock` with routers."""

    norm: nn.Module
    proj_mlp: nn.Module
    act_mlp: nn.Module
    proj_out: nn.Module
    channel_order: Tensor
    queries: SlicedLayer
    keys_values: SlicedLayer
    channels: SlicedLayer

    def complete_forward(
        self, image: Tensor, text: Tensor, conditioning: Tensor, rope: Rope, keywords: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """Diffusers' own forward -> text and image."""
        ...


@dataclass(frozen=True)
class StreamCall:
    """What a block of either kind is run with.

    Attributes:
        image: (B, N, C).
        text: (B, T, C).
        conditioning: (B, C), of time, guidance and pooled text.
        rope: Of the positions of text and image.
        width: Masks of heads, groups and, in a double block, the text's groups.
        gating: Decides the tokens.
        index: Number of the block in the model.
        keywords: diffusers' ``joint_attention_kwargs``; static execution alone understands any.
    """

    image: Tensor
    text: Tensor
    conditioning: Tensor
    rope: Rope
    width: BlockWidth
    gating: Gating
    index: int
    keywords: dict[str, Any] | None = None

    def keep(self, router: StreamTokenRouter, image: Tensor, text: Tensor) -> Tensor:
        """(B, N) mask of the image tokens that are not skipped."""
        return self.gating.tokens(self.index, router(image, text, self.conditioning))


class StreamExecutor(Protocol):
    """Runs whole blocks of either kind."""

    def double(self, block: DoubleBlock, call: StreamCall) -> Decided:
        """Run a double block."""
        ...

    def single(self, block: SingleBlock, call: StreamCall) -> Decided:
        """Run a single block."""
        ...


def rotated(inputs: Tensor, rope: Rope) -> Tensor:
    """Apply the rotary embedding to (B, S, H, C_h) queries or keys, pairs of channels side by side, in fp32."""
    cosine, sine = (part.unsqueeze(-2) for part in rope)
    real, imaginary = inputs.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (inputs.float() * cosine + turned.float() * sine).to(inputs.dtype)


def heads_of(layer: nn.Module, inputs: Tensor, dim: int, time: Tensor | None) -> Tensor:
    """(B, S, C) -> (B, S, H, C_h), projected; ``time`` is that of `BlockWidth`."""
    return through(layer, inputs, time).unflatten(-1, (-1, dim))


def by_source(mask: Tensor, order: Tensor) -> Tensor:
    """Turn a (B, U) mask by rank into one by stored head or channel, of which ``order`` names as many as there are."""
    stored = mask.repeat_interleave(len(order) // mask.shape[1], dim=1)
    return torch.zeros_like(stored).index_copy(1, order, stored)


def within_half(tokens: Tensor) -> Tensor:
    """Clip fp16 tokens where diffusers does."""
    return tokens.clip(-HALF_LIMIT, HALF_LIMIT) if tokens.dtype == torch.float16 else tokens
