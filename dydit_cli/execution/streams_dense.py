"""Dense and static execution of blocks with two streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dydit_cli.dynamic.gates import Gating
from dydit_cli.execution.interface import BlockWidth
from dydit_cli.execution.streams import (
    Decided,
    DoubleBlock,
    Rope,
    SingleBlock,
    by_source,
    heads_of,
    rotated,
    within_half,
)


class DenseStreams:
    """Computes everything with the block's own layers, in diffusers' order of operations, and multiplies by masks."""

    def double(
        self,
        block: DoubleBlock,
        image: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rope: Rope,
        width: BlockWidth,
        gating: Gating,
        index: int,
        keywords: dict[str, Any] | None = None,
    ) -> Decided:
        """See `StreamExecutor`."""
        attn = block.attn
        dim, length = attn.head_dim, text.shape[1]
        inputs, gate, shift, scale, mlp_gate = block.norm1(image, emb=conditioning)
        text_inputs, text_gate, text_shift, text_scale, text_mlp_gate = block.norm1_context(
            text, emb=conditioning
        )
        query = torch.cat(
            [
                attn.norm_added_q(heads_of(attn.add_q_proj, text_inputs, dim)),
                attn.norm_q(heads_of(attn.to_q, inputs, dim)),
            ],
            dim=1,
        )
        key = torch.cat(
            [
                attn.norm_added_k(heads_of(attn.add_k_proj, text_inputs, dim)),
                attn.norm_k(heads_of(attn.to_k, inputs, dim)),
            ],
            dim=1,
        )
        value = torch.cat(
            [heads_of(attn.add_v_proj, text_inputs, dim), heads_of(attn.to_v, inputs, dim)], dim=1
        )
        mixed = block.attend(rotated(query, rope), rotated(key, rope), value)
        mixed = (mixed * head_factors(width, attn.head_order, mixed)).flatten(2, 3).to(query.dtype)
        update = attn.to_out[1](attn.to_out[0](mixed[:, length:].contiguous()))
        text_update = attn.to_add_out(mixed[:, :length].contiguous())

        image = image + gate.unsqueeze(1) * update
        text = text + text_gate.unsqueeze(1) * text_update
        keep = gating.tokens(index, block.token_router(image, text, conditioning))

        inputs = block.norm2(image) * (1 + scale[:, None]) + shift[:, None]
        update = mlp_gate.unsqueeze(1) * masked_mlp(block.ff, inputs, width.groups)
        image = image + keep.to(image.dtype)[:, :, None] * update
        text_inputs = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
        text_groups = width.context_groups if width.context_groups is not None else width.groups
        text = text + text_mlp_gate.unsqueeze(1) * masked_mlp(block.ff_context, text_inputs, text_groups)
        return image, within_half(text), keep

    def single(
        self,
        block: SingleBlock,
        image: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rope: Rope,
        width: BlockWidth,
        gating: Gating,
        index: int,
        keywords: dict[str, Any] | None = None,
    ) -> Decided:
        """See `StreamExecutor`. A skipped token has none of the update, the bias of the projection included."""
        attn = block.attn
        dim, length = attn.head_dim, text.shape[1]
        keep = gating.tokens(index, block.token_router(image, text, conditioning))
        tokens = torch.cat([text, image], dim=1)
        inputs, gate = block.norm(tokens, emb=conditioning)
        hidden = block.proj_mlp(inputs)
        hidden = block.act_mlp(hidden * by_source(width.groups, block.channel_order).to(hidden)[:, None])
        query = attn.norm_q(heads_of(attn.to_q, inputs, dim))
        key = attn.norm_k(heads_of(attn.to_k, inputs, dim))
        value = heads_of(attn.to_v, inputs, dim)
        mixed = block.attend(rotated(query, rope), rotated(key, rope), value)
        mixed = (mixed * head_factors(width, attn.head_order, mixed)).flatten(2, 3).to(query.dtype)
        update = gate.unsqueeze(1) * block.proj_out(torch.cat([mixed, hidden], dim=2))
        updated = torch.cat([keep.new_ones(len(keep), length), keep], dim=1)
        tokens = within_half(tokens + updated.to(tokens.dtype)[:, :, None] * update)
        return tokens[:, length:], tokens[:, :length], keep


class StaticStreams:
    """Calls diffusers' own forward of the block: all that it supports works, attention processors and IP-adapters included."""

    def double(
        self,
        block: DoubleBlock,
        image: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rope: Rope,
        width: BlockWidth,
        gating: Gating,
        index: int,
        keywords: dict[str, Any] | None = None,
    ) -> Decided:
        """See `StreamExecutor`."""
        if len(image):  # diffusers' rotary embedding takes no empty batch
            text, image = block.complete_forward(image, text, conditioning, rope, keywords)
        return image, text, everything(image)

    def single(
        self,
        block: SingleBlock,
        image: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rope: Rope,
        width: BlockWidth,
        gating: Gating,
        index: int,
        keywords: dict[str, Any] | None = None,
    ) -> Decided:
        """See `StreamExecutor`."""
        if len(image):
            text, image = block.complete_forward(image, text, conditioning, rope, keywords)
        return image, text, everything(image)


def everything(image: Tensor) -> Tensor:
    """(B, N) ones in fp32."""
    return torch.ones(1, 1, device=image.device).expand(image.shape[0], image.shape[1])


def head_factors(width: BlockWidth, order: Tensor, mixed: Tensor) -> Tensor:
    """What the (B, S, H, C_h) outputs of heads are multiplied by."""
    return by_source(width.heads, order).to(mixed.dtype)[:, None, :, None]


def masked_mlp(layer: Any, inputs: Tensor, groups: Tensor) -> Tensor:
    """diffusers' `FeedForward` with a (B, G) mask on what enters its GELU, where a zero stays zero."""
    opening = layer.net[0]
    hidden = opening.proj(inputs)
    hidden = opening.gelu(hidden * by_source(groups, layer.channel_order).to(hidden.dtype)[:, None])
    for following in layer.net[1:]:
        hidden = following(hidden)
    return hidden
