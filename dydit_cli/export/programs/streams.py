"""The blocks of two streams (FLUX) for `ProgramExecutor`.

In a single block a skipped image token is a key and a value and nothing else. Samples of a batch may keep different numbers of
tokens: each computes as many as the one that keeps most, its kept ones first, and the updates of the others are dropped. A batch of
one computes what it keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.execution.interface import BlockWidth, Modulation, add_gated, modulated
from dydit_cli.execution.slices import Slice, closed, entered
from dydit_cli.execution.streams import (
    Decided,
    DoubleBlock,
    Rope,
    SingleBlock,
    StreamCall,
    rotated,
    within_half,
)
from dydit_cli.execution.units import SlicedLayer
from dydit_cli.export.programs.weights import active_units


class ProgramStreams(ABC):
    """Blocks of two streams with gathered weights and tokens."""

    @abstractmethod
    def active(self, layer: SlicedLayer, units: Tensor) -> Slice:
        """The weights of the (k,) ``units`` of a layer."""

    def double(self, block: DoubleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`."""
        image, text, width = call.image, call.text, call.width
        inputs, gate, shift, scale, mlp_gate = block.norm1(image, emb=call.conditioning)
        text_inputs, text_gate, text_shift, text_scale, text_mlp_gate = block.norm1_context(
            text, emb=call.conditioning
        )
        update, text_update = self._joint_attention(block, inputs, text_inputs, width, call.rope)
        image = add_gated(image, gate[:, None], update)
        text = add_gated(text, text_gate[:, None], text_update)
        keep = call.keep(block.token_router, image, text)

        text_groups = width.context_groups if width.context_groups is not None else width.groups
        text_inputs = modulated(block.norm2_context(text), text_shift[:, None], text_scale[:, None])
        text_update = through_mlp(text_inputs, self.active(block.text_channels, active_units(text_groups)))
        text = within_half(add_gated(text, text_mlp_gate[:, None], text_update))
        weights = self.active(block.image_channels, active_units(width.groups))
        image = through_kept(image, keep, block.norm2, Modulation(shift, scale, mlp_gate), weights)
        return image, text, keep

    def _joint_attention(
        self, block: DoubleBlock, image: Tensor, text: Tensor, width: BlockWidth, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """Updates of image and text, not gated yet."""
        attn, length, units = block.attn, text.shape[1], active_units(width.heads)
        of_image, of_text = (self.active(part, units) for part in (block.image_heads, block.text_heads))
        query, key, value = projections(image, of_image, 3, attn.head_dim)
        text_query, text_key, text_value = projections(text, of_text, 3, attn.head_dim)
        query = rotated(torch.cat([attn.norm_added_q(text_query), attn.norm_q(query)], dim=1), rope)
        key = rotated(torch.cat([attn.norm_added_k(text_key), attn.norm_k(key)], dim=1), rope)
        mixed = attention(query, key, torch.cat([text_value, value], dim=1)).to(query.dtype)
        return closed(mixed[:, length:], of_image), closed(mixed[:, :length], of_text)

    def single(self, block: SingleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`."""
        image, text, width, attn = call.image, call.text, call.width, block.attn
        keep = call.keep(block.token_router, image, text)
        tokens = torch.cat([text, image], dim=1)
        inputs, gate = block.norm(tokens, emb=call.conditioning)
        length = text.shape[1]
        updated = torch.cat([keep.new_ones(keep.shape[0], length), keep], dim=1)
        places = kept_first(updated)
        # Text is never skipped, and prompts have two tokens at least (`inputs.py`). Tracing asks.
        torch._check(places.shape[1] > 1)
        chosen = taken(inputs, places)

        heads, groups = active_units(width.heads), active_units(width.groups)
        of_all, of_chosen = self.active(block.keys_values, heads), self.active(block.queries, heads)
        key, value = projections(inputs, of_all, 2, attn.head_dim)
        (query,) = projections(chosen, of_chosen, 1, attn.head_dim)
        rope = call.rope[0][places], call.rope[1][places]
        mixed = attention(rotated(attn.norm_q(query), rope), rotated(attn.norm_k(key), call.rope), value)
        update = closed(mixed.to(inputs.dtype), of_chosen)
        update = update + through_mlp(chosen, self.active(block.channels, groups), biased=False)
        # Of a place that is there to fill up, the factor is zero.
        update = updated.gather(1, places).to(update.dtype)[:, :, None] * gate[:, None] * update
        index = places[:, :, None].expand(-1, -1, tokens.shape[2])
        tokens = within_half(tokens.scatter_add(1, index, update.to(tokens.dtype)))
        return tokens[:, length:], tokens[:, :length], keep


def kept_first(updated: Tensor) -> Tensor:
    """(B, S) mask of tokens -> (B, K) places, those of each sample's kept ones first; K is the largest number of them."""
    most = updated.sum(dim=1).max()
    # Indices, because their number may be a symbol where a number that is read from a tensor may not be a size.
    columns = (torch.arange(updated.shape[1], device=updated.device) < most).nonzero().squeeze(1)
    return updated.argsort(dim=1, descending=True, stable=True).index_select(1, columns)


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """(B, S, C) tokens at (B, K) places -> (B, K, C)."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, K, H, C_h), twice (B, S, H, C_h) -> (B, K, H * C_h)."""
    by_head = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)


def projections(inputs: Tensor, weights: Slice, kinds: int, dim: int) -> tuple[Tensor, ...]:
    """(B, S, C) -> ``kinds`` times (B, S, k, C_h), which lie side by side in each head's rows."""
    return entered(inputs, weights).unflatten(-1, (weights.units, kinds, dim)).unbind(-2)


def through_mlp(inputs: Tensor, weights: Slice, biased: bool = True) -> Tensor:
    """(..., C) -> (..., C) through the active groups."""
    hidden = F.gelu(entered(inputs, weights), approximate="tanh")
    return closed(hidden, weights, biased=biased)


def through_kept(
    tokens: Tensor, keep: Tensor, norm: nn.Module, modulation: Modulation, weights: Slice
) -> Tensor:
    """(B, N, C) tokens, of which those of the (B, N) mask have gone through norm, modulation and MLP, and back with its gate."""
    rows = tokens.flatten(0, 1)
    kept = keep.flatten().nonzero().squeeze(1)
    sample = kept // tokens.shape[1]
    inputs = modulated(
        norm(rows.index_select(0, kept)),
        modulation.shift.index_select(0, sample),
        modulation.scale.index_select(0, sample),
    )
    update = modulation.gate.index_select(0, sample) * through_mlp(inputs, weights)
    return rows.index_add(0, kept, update.to(rows.dtype)).view_as(tokens)
