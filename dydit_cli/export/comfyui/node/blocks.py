"""The two blocks of FLUX, computed as far as their routers ask for.

Heads and channels that are off are left out of the weights. A skipped image token misses the MLP in a block of two streams; in a
block of one it misses the whole update and is a key and a value only, so that its query, its MLP and its output are not computed.
Text is never skipped, and the biases of output projections stay whatever is off.

Blocks are ComfyUI's modules, of which the linear layers and the norms of queries and keys are used. Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .host import Host
from .routers import Width

EPS = 1e-6
HALF_LIMIT = 65504.0
"""The largest fp16 number."""

Keep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, N, C) image, (B, T, C) text, (B, C) conditioning -> (B, N) bool."""


@dataclass(frozen=True)
class Call:
    """What a block is run with.

    Attributes:
        heads: H.
        head_dim: D.
        mlp: Hidden channels of an MLP.
        width: Of the block, for all samples of the call.
        keep: Decides the image tokens.
        conditioning: (B, C) of time, guidance and pooled text.
        rope: (B or 1, S, D / 2, 2, 2) rotations of text and image positions.
        mask: (B or 1, 1 or H, Q, S) for attention, where there is one.
        options: ComfyUI's ``transformer_options``.
    """

    heads: int
    head_dim: int
    mlp: int
    width: Width
    keep: Keep
    conditioning: Tensor
    rope: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Modulation:
    """adaLN values of one branch, each (B, 1, C)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def of(self, samples: Tensor) -> Modulation:
        """Those of (R,) tokens, each (R, C), by the sample that a token belongs to."""
        return Modulation(self.shift[samples, 0], self.scale[samples, 0], self.gate[samples, 0])

    def __call__(self, tokens: Tensor) -> Tensor:
        """Normalise and modulate."""
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        return torch.addcmul(self.shift, normed, 1 + self.scale)

    def add(self, tokens: Tensor, update: Tensor) -> Tensor:
        """tokens + gate * update."""
        return torch.addcmul(tokens, self.gate, update)


def double(block: Any, host: Host, image: Tensor, text: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A block of two streams: (B, N, C) image and (B, T, C) text tokens in and out."""
    image_first, image_second = modulations(block.img_mod.lin, call.conditioning, 2)
    text_first, text_second = modulations(block.txt_mod.lin, call.conditioning, 2)
    streams = ((block.txt_attn, text_first(text)), (block.img_attn, image_first(image)))
    mixed, length = joint_attention(streams, host, call), text.shape[1]
    columns = None if call.width.heads is None else channels_of(call.width.heads, call.head_dim)
    image = image_first.add(image, linear(block.img_attn.proj, host, mixed[:, length:], columns=columns))
    text = text_first.add(text, linear(block.txt_attn.proj, host, mixed[:, :length], columns=columns))
    keep = call.keep(image, text, call.conditioning)

    update = mlp(block.txt_mlp, host, text_second(text), call.width.text_channels)
    text = within_half(text_second.add(text, update))
    kept = keep.flatten().nonzero().squeeze(1)
    if not len(kept):
        return image, text
    if len(kept) == keep.numel():
        update = mlp(block.img_mlp, host, image_second(image), call.width.channels)
        return image_second.add(image, update), text
    rows, values = image.flatten(0, 1), image_second.of(kept // image.shape[1])
    before = rows.index_select(0, kept)
    after = values.add(before, mlp(block.img_mlp, host, values(before), call.width.channels))
    return rows.index_copy(0, kept, after).view_as(image), text


def single(block: Any, host: Host, tokens: Tensor, length: int, call: Call) -> Tensor:
    """A block of one stream: (B, S, C) text and then image tokens in and out; the first ``length`` are text."""
    (modulation,) = modulations(block.modulation.lin, call.conditioning, 1)
    batch, total, hidden = tokens.shape
    keep = call.keep(tokens[:, length:], tokens[:, :length], call.conditioning)
    updated = torch.cat([keep.new_ones(batch, length), keep], dim=1)
    chosen = updated.flatten().nonzero().squeeze(1)
    samples, places = chosen // total, chosen % total

    inputs = modulation(tokens)
    into = taken(inputs.flatten(0, 1), chosen)
    width = call.width
    with host.weights(block.linear1, tokens) as (weight, bias):
        attention = weight[: 3 * hidden], bias[: 3 * hidden]
        key, value = by_head(inputs, attention, (1, 3), call)
        (query,) = by_head(into, attention, (0, 1), call)
        opening = [select(part[3 * hidden :], width.channels, 0) for part in (weight, bias)]
        active = F.gelu(F.linear(into, *opening), approximate="tanh")
    parts = [active]
    if key.shape[-2]:
        rope = call.rope.expand(batch, -1, -1, -1, -1)
        query = rotated(block.norm.query_norm(query), rope[samples, places])
        key = rotated(block.norm.key_norm(key), call.rope)
        counts = updated.sum(dim=1).tolist()
        parts.insert(0, chosen_attention(query, key, value, counts, places, host, call))
    columns = None
    if width.heads is not None or width.channels is not None:
        heads = torch.arange(call.heads, device=tokens.device) if width.heads is None else width.heads
        channels = torch.arange(call.mlp, device=tokens.device) if width.channels is None else width.channels
        columns = torch.cat([channels_of(heads, call.head_dim), hidden + channels])
    update = linear(block.linear2, host, torch.cat(parts, dim=-1), columns=columns)
    rows = tokens.flatten(0, 1)
    after = within_half(modulation.of(samples).add(taken(rows, chosen), update))
    return (after if len(chosen) == len(rows) else rows.index_copy(0, chosen, after)).view_as(tokens)


def modulations(layer: Any, conditioning: Tensor, branches: int) -> list[Modulation]:
    """adaLN values of a stream, for each of its branches."""
    values = layer(F.silu(conditioning))[:, None].chunk(3 * branches, dim=-1)
    return [Modulation(*values[3 * index : 3 * index + 3]) for index in range(branches)]


def joint_attention(streams: Sequence[tuple[Any, Tensor]], host: Host, call: Call) -> Tensor:
    """Of layers and (B, L, C) tokens of text and image: (B, S, h * D), what the active heads give."""
    queries, keys, values = [], [], []
    for attention, inputs in streams:
        with host.weights(attention.qkv, inputs) as weights:
            query, key, value = by_head(inputs, weights, (0, 3), call)
        if not query.shape[-2]:
            return torch.cat([tokens for _, tokens in streams], dim=1)[..., :0]
        queries.append(attention.norm.query_norm(query))
        keys.append(attention.norm.key_norm(key))
        values.append(value)
    query, key = (rotated(torch.cat(parts, dim=1), call.rope) for parts in (queries, keys))
    value = torch.cat(values, dim=1)
    mask = None if call.mask is None else of_heads(call.mask, call)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return host.attend(query.to(value.dtype), key.to(value.dtype), value, mask, call.options)


def chosen_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Sequence[int], places: Tensor, host: Host, call: Call
) -> Tensor:
    """(R, h, D) queries of the tokens that are updated, (B, S, h, D) keys and values of all -> (R, h * D).

    Args:
        query: Sample after sample. key: Of all tokens. value: Of all tokens.
        counts: How many queries each sample has.
        places: (R,) of the queries in their sample.
        host: See `Host`.
        call: Of the block.
    """
    key, value = key.transpose(1, 2).to(value.dtype), value.transpose(1, 2)
    mixed, start, first = [], 0, 0
    while first < len(counts):
        alike = 1
        while first + alike < len(counts) and counts[first + alike] == counts[first]:
            alike += 1
        samples, end = slice(first, first + alike), start + alike * counts[first]
        asked = query[start:end].unflatten(0, (alike, counts[first])).transpose(1, 2).to(value.dtype)
        mask = None if call.mask is None else rows_of_mask(call, samples, places[start:end].view(alike, -1))
        mixed.append(host.attend(asked, key[samples], value[samples], mask, call.options).flatten(0, 1))
        start, first = end, first + alike
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def rows_of_mask(call: Call, samples: slice, places: Tensor) -> Tensor:
    """The rows of an attention mask that belong to the (A, K) queries of A samples."""
    mask: Tensor = call.mask  # type: ignore[assignment]  # asked for where there is one
    mask = of_heads(mask if len(mask) == 1 else mask[samples], call).expand(len(places), -1, -1, -1)
    if mask.shape[2] == 1:
        return mask
    return mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def of_heads(mask: Tensor, call: Call) -> Tensor:
    """A mask with a row a head, where it has any, for the active heads."""
    return mask if mask.shape[1] == 1 else select(mask, call.width.heads, 1)


def by_head(
    inputs: Tensor, weights: tuple[Tensor, Tensor], span: tuple[int, int], call: Call
) -> tuple[Tensor, ...]:
    """(..., C) -> queries, keys and values of the active heads, or a ``span`` of the three: each (..., h, D)."""
    weight, bias = (
        select(part.unflatten(0, (3, call.heads, -1))[slice(*span)], call.width.heads, 1) for part in weights
    )
    flat = F.linear(inputs, weight.flatten(0, 2), bias.flatten())
    return flat.unflatten(-1, weight.shape[:3]).unbind(-3)


def mlp(layers: Any, host: Host, inputs: Tensor, channels: Tensor | None) -> Tensor:
    """(..., C) -> (..., C) through some of the hidden channels, or all."""
    hidden = linear(layers.get_submodule("0"), host, inputs, rows=channels)
    return linear(layers.get_submodule("2"), host, F.gelu(hidden, approximate="tanh"), columns=channels)


def linear(
    layer: Any, host: Host, inputs: Tensor, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """A linear layer of which some rows or columns are used; ``inputs`` have these columns only."""
    with host.weights(layer, inputs) as (weight, bias):
        return F.linear(inputs, select(select(weight, rows, 0), columns, 1), select(bias, rows, 0))


def rotated(inputs: Tensor, rope: Tensor) -> Tensor:
    """Rotate (..., h, D) queries or keys, pairs of channels side by side, by (..., D / 2, 2, 2) matrices, in the matrices' type."""
    pairs, turns = inputs.to(rope.dtype).unflatten(-1, (-1, 2)), rope.unsqueeze(-4)
    turned = torch.addcmul(turns[..., 0] * pairs[..., :1], turns[..., 1], pairs[..., 1:])
    return turned.flatten(-2).to(inputs.dtype)


def channels_of(heads: Tensor, dim: int) -> Tensor:
    """(h,) heads -> (h * D,) the channels that they fill."""
    return (heads[:, None] * dim + torch.arange(dim, device=heads.device)).flatten()


def select(values: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """Some of a tensor's rows or columns, or all."""
    return values if index is None else values.index_select(dim, index)


def taken(rows: Tensor, index: Tensor) -> Tensor:
    """Some rows by ascending indices, or all."""
    return rows if len(index) == len(rows) else rows.index_select(0, index)


def within_half(tokens: Tensor) -> Tensor:
    """fp16 tokens without what is beyond its range."""
    return tokens.clip(-HALF_LIMIT, HALF_LIMIT) if tokens.dtype == torch.float16 else tokens
