"""Dense and static execution of blocks with two streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.dynamic.timed import is_timed, through
from dydit_cli.errors import DyditError
from dydit_cli.execution.interface import BlockWidth
from dydit_cli.execution.streams import (
    Decided,
    DoubleBlock,
    SingleBlock,
    StreamCall,
    by_source,
    heads_of,
    rotated,
    within_half,
)


class DenseStreams:
    """Computes everything with the block's own layers, in diffusers' order of operations, and multiplies by masks."""

    def double(self, block: DoubleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`."""
        attn, width, time = block.attn, call.width, call.width.time
        image, text = call.image, call.text
        dim, length = attn.head_dim, text.shape[1]
        inputs, gate, shift, scale, mlp_gate = block.norm1(image, emb=call.conditioning)
        text_inputs, text_gate, text_shift, text_scale, text_mlp_gate = block.norm1_context(
            text, emb=call.conditioning
        )
        query = torch.cat(
            [
                attn.norm_added_q(heads_of(attn.add_q_proj, text_inputs, dim, time)),
                attn.norm_q(heads_of(attn.to_q, inputs, dim, time)),
            ],
            dim=1,
        )
        key = torch.cat(
            [
                attn.norm_added_k(heads_of(attn.add_k_proj, text_inputs, dim, time)),
                attn.norm_k(heads_of(attn.to_k, inputs, dim, time)),
            ],
            dim=1,
        )
        value = torch.cat(
            [heads_of(attn.add_v_proj, text_inputs, dim, time), heads_of(attn.to_v, inputs, dim, time)], dim=1
        )
        mixed = block.attend(rotated(query, call.rope), rotated(key, call.rope), value)
        mixed = (mixed * head_factors(width, attn.head_order, mixed)).flatten(2, 3).to(query.dtype)
        update = attn.to_out[1](through(attn.to_out[0], mixed[:, length:].contiguous(), time))
        text_update = through(attn.to_add_out, mixed[:, :length].contiguous(), time)

        image = image + gate.unsqueeze(1) * update
        text = text + text_gate.unsqueeze(1) * text_update
        keep = call.keep(block.token_router, image, text)

        inputs = block.norm2(image) * (1 + scale[:, None]) + shift[:, None]
        update = mlp_gate.unsqueeze(1) * masked_mlp(block.ff, inputs, width.groups, time)
        image = image + keep.to(image.dtype)[:, :, None] * update
        text_inputs = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
        text_groups = width.context_groups if width.context_groups is not None else width.groups
        text_update = masked_mlp(block.ff_context, text_inputs, text_groups, time)
        text = text + text_mlp_gate.unsqueeze(1) * text_update
        return image, within_half(text), keep

    def single(self, block: SingleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`. A skipped token has none of the update, the bias of the projection included."""
        attn, width, time = block.attn, call.width, call.width.time
        dim, length = attn.head_dim, call.text.shape[1]
        keep = call.keep(block.token_router, call.image, call.text)
        tokens = torch.cat([call.text, call.image], dim=1)
        inputs, gate = block.norm(tokens, emb=call.conditioning)
        hidden = through(block.proj_mlp, inputs, time)
        hidden = block.act_mlp(hidden * by_source(width.groups, block.channel_order).to(hidden)[:, None])
        query = attn.norm_q(heads_of(attn.to_q, inputs, dim, time))
        key = attn.norm_k(heads_of(attn.to_k, inputs, dim, time))
        value = heads_of(attn.to_v, inputs, dim, time)
        mixed = block.attend(rotated(query, call.rope), rotated(key, call.rope), value)
        mixed = (mixed * head_factors(width, attn.head_order, mixed)).flatten(2, 3).to(query.dtype)
        projected = through(block.proj_out, torch.cat([mixed, hidden], dim=2), time)
        update = gate.unsqueeze(1) * projected
        updated = torch.cat([keep.new_ones(len(keep), length), keep], dim=1)
        tokens = within_half(tokens + updated.to(tokens.dtype)[:, :, None] * update)
        return tokens[:, length:], tokens[:, :length], keep


class StaticStreams:
    """Calls diffusers' own forward of the block: all that it supports works, attention processors and IP-adapters included.

    That forward knows no timesteps: blocks with weights that follow them are computed as `DenseStreams` does, everything on.
    """

    def double(self, block: DoubleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`."""
        if follows_timestep(block, call):
            image, text, _ = DenseStreams().double(block, replace(call, gating=CompleteGating()))
            return image, text, everything(image)
        return self._complete(block, call)

    def single(self, block: SingleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`."""
        if follows_timestep(block, call):
            image, text, _ = DenseStreams().single(block, replace(call, gating=CompleteGating()))
            return image, text, everything(image)
        return self._complete(block, call)

    @staticmethod
    def _complete(block: DoubleBlock | SingleBlock, call: StreamCall) -> Decided:
        image, text = call.image, call.text
        if len(image):  # diffusers' rotary embedding takes no empty batch
            text, image = block.complete_forward(image, text, call.conditioning, call.rope, call.keywords)
        return image, text, everything(image)


def follows_timestep(block: Any, call: StreamCall) -> bool:
    """Whether a block's weights follow the timestep.

    Raises:
        DyditError: If they do, and the call wants what diffusers' own forward alone can do.
    """
    if not isinstance(block, nn.Module) or not is_timed(block):
        return False
    if call.keywords:
        raise DyditError(
            f"A model with TD-LoRA cannot use joint_attention_kwargs: {', '.join(sorted(call.keywords))}.",
            why="diffusers' own attention, which understands them, does not tell its layers the timestep.",
            fix="Leave them out, or use a model that was trained with method full or lora.",
        )
    return True


def everything(image: Tensor) -> Tensor:
    """(B, N) ones in fp32."""
    return torch.ones(1, 1, device=image.device).expand(image.shape[0], image.shape[1])


def head_factors(width: BlockWidth, order: Tensor, mixed: Tensor) -> Tensor:
    """What the (B, S, H, C_h) outputs of heads are multiplied by."""
    return by_source(width.heads, order).to(mixed.dtype)[:, None, :, None]


def masked_mlp(layer: Any, inputs: Tensor, groups: Tensor, time: Tensor | None) -> Tensor:
    """diffusers' `FeedForward` with a (B, G) mask on what enters its GELU, where a zero stays zero."""
    opening = layer.net[0]
    hidden = through(opening.proj, inputs, time)
    hidden = opening.gelu(hidden * by_source(groups, layer.channel_order).to(hidden.dtype)[:, None])
    for following in layer.net[1:]:
        hidden = through(following, hidden, time)
    return hidden
