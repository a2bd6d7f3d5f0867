"""Compact execution of blocks with two streams: active heads and groups of both, text and kept image tokens.

In a single block a skipped image token is a key and a value and nothing else, so that its query, its row of attention, its MLP and
its output projection are not computed; this is exact. Rows of a batch that keep different numbers of tokens are projected
together and attend apart, those with equal numbers side by side: nothing is padded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.execution.interface import BlockWidth, Modulation, add_gated, modulated
from dydit_cli.execution.plan import CompactWidth, Part, active_units, grouped
from dydit_cli.execution.slices import Slice, closed, entered
from dydit_cli.execution.streams import (
    Decided,
    DoubleBlock,
    SingleBlock,
    StreamCall,
    rotated,
    within_half,
)
from dydit_cli.execution.units import SlicedLayer

Outcome = TypeVar("Outcome")


class CompactStreams(ABC):
    """The blocks of two streams for an executor that has sliced weights."""

    @abstractmethod
    def _run(
        self,
        layer: SlicedLayer,
        active: tuple[int, ...],
        width: BlockWidth,
        compute: Callable[[Slice], Outcome],
    ) -> Outcome:
        """Compute with a layer's active weights, which stay where they are meanwhile."""

    def double(self, block: DoubleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`."""
        image, text, width, conditioning = call.image, call.text, call.width, call.conditioning
        inputs, gate, shift, scale, mlp_gate = block.norm1(image, emb=conditioning)
        text_inputs, text_gate, text_shift, text_scale, text_mlp_gate = block.norm1_context(
            text, emb=conditioning
        )
        heads, groups, text_groups = parts_of_masks(width, image.device)
        update, text_update = torch.empty_like(inputs), torch.empty_like(text_inputs)
        for part in heads:
            rows = part.rows
            attended = self._joint_attention(
                block, rows_of(inputs, rows), rows_of(text_inputs, rows), call, part
            )
            if rows is None:
                update, text_update = attended
            else:
                update[rows] = attended[0].to(update.dtype)
                text_update[rows] = attended[1].to(text_update.dtype)
        image = add_gated(image, gate[:, None], update)
        text = add_gated(text, text_gate[:, None], text_update)
        keep = call.keep(block.token_router, image, text)

        text_inputs = modulated(block.norm2_context(text), text_shift[:, None], text_scale[:, None])
        text_update = torch.empty_like(text_inputs)
        for part in text_groups:
            chosen = rows_of(text_inputs, part.rows)
            updated = self._run(block.text_channels, part.active, width, partial(mlp_rows, chosen, part.rows))
            if part.rows is None:
                text_update = updated
            else:
                text_update[part.rows] = updated.to(text_update.dtype)
        text = within_half(add_gated(text, text_mlp_gate[:, None], text_update))

        for part in groups:
            kept = keep if part.rows is None else only_rows(keep, part.rows)
            image = self._image_mlp(
                block, image, Modulation(shift, scale, mlp_gate), kept, part.active, width
            )
        return image, text, keep

    def _image_mlp(
        self,
        block: DoubleBlock,
        image: Tensor,
        values: Modulation,
        kept: Tensor,
        active: tuple[int, ...],
        width: BlockWidth,
    ) -> Tensor:
        """(B, N, C) image tokens of which those of the (B, N) mask have gone through the MLP."""
        flat = kept.flatten().nonzero().squeeze(1)
        if not len(flat):
            return image
        if len(flat) == kept.numel():
            inputs = modulated(block.norm2(image), values.shift[:, None], values.scale[:, None])
            update = self._run(block.image_channels, active, width, partial(mlp_rows, inputs, None))
            return add_gated(image, values.gate[:, None], update)
        sample = flat // image.shape[1]
        rows = image.flatten(0, 1)
        before = rows.index_select(0, flat)
        inputs = modulated(
            block.norm2(before), values.shift.index_select(0, sample), values.scale.index_select(0, sample)
        )
        update = self._run(block.image_channels, active, width, partial(mlp_rows, inputs, sample))
        after = add_gated(before, values.gate.index_select(0, sample), update)
        return replaced(rows, flat, after.to(image.dtype)).view_as(image)

    def _joint_attention(
        self,
        block: DoubleBlock,
        image: Tensor,
        text: Tensor,
        call: StreamCall,
        part: Part,
    ) -> tuple[Tensor, Tensor]:
        """Updates of image and text, not gated yet; samples that share their heads."""
        active, samples, width, rope = part.active, part.rows, call.width, call.rope

        def with_both(of_text: Slice, of_image: Slice) -> tuple[Tensor, Tensor]:
            if not active:
                # The biases of the projections stay.
                return of_image.leave_bias.expand_as(image), of_text.leave_bias.expand_as(text)
            attn, units = block.attn, len(active)
            query, key, value = projections(image, of_image, 3, attn.head_dim, samples)
            text_query, text_key, text_value = projections(text, of_text, 3, attn.head_dim, samples)
            query = rotated(torch.cat([attn.norm_added_q(text_query), attn.norm_q(query)], dim=1), rope)
            key = rotated(torch.cat([attn.norm_added_k(text_key), attn.norm_k(key)], dim=1), rope)
            mixed = block.attend(query, key, torch.cat([text_value, value], dim=1))
            length = text.shape[1]
            of_tokens = mixed.reshape(len(image), -1, units * attn.head_dim).to(query.dtype)
            return (
                closed(of_tokens[:, length:], of_image, samples),
                closed(of_tokens[:, :length], of_text, samples),
            )

        return self._run(
            block.text_heads,
            active,
            width,
            lambda of_text: self._run(block.image_heads, active, width, partial(with_both, of_text)),
        )

    def single(self, block: SingleBlock, call: StreamCall) -> Decided:
        """See `StreamExecutor`."""
        image, text, width = call.image, call.text, call.width
        keep = call.keep(block.token_router, image, text)
        tokens = torch.cat([text, image], dim=1)
        inputs, gate = block.norm(tokens, emb=call.conditioning)
        length, total = text.shape[1], tokens.shape[1]
        updated = torch.cat([keep.new_ones(len(keep), length), keep], dim=1).bool()
        counts = updated.sum(dim=1).tolist()
        flat_tokens, flat_inputs = tokens.flatten(0, 1), inputs.flatten(0, 1)
        heads, groups, *_ = parts_of_masks(width, image.device)
        result = flat_tokens
        for (active, active_groups), rows in joint_parts((heads, groups), len(image)):
            chosen = Chosen.of(updated, counts, rows)
            if not chosen.samples:
                continue
            into = flat_inputs if chosen.everything else flat_inputs.index_select(0, chosen.flat)
            sample = chosen.flat // total
            attended = self._attention_of_chosen(block, inputs, into, call, chosen, active)
            update = attended + self._run(
                block.channels, active_groups, width, partial(mlp_rows, into, sample, biased=False)
            )
            before = flat_tokens if chosen.everything else flat_tokens.index_select(0, chosen.flat)
            after = within_half(add_gated(before, gate.index_select(0, sample), update))
            after = after.to(tokens.dtype)
            result = after if chosen.everything else replaced(result, chosen.flat, after)
        tokens = result.view_as(tokens)
        return tokens[:, length:], tokens[:, :length], keep

    def _attention_of_chosen(
        self,
        block: SingleBlock,
        inputs: Tensor,
        into: Tensor,
        call: StreamCall,
        chosen: Chosen,
        active: tuple[int, ...],
    ) -> Tensor:
        """What attention adds to the (R, C) chosen tokens ``into`` of (B, S, C) ``inputs``, bias included."""
        attn, total, rope, width = block.attn, inputs.shape[1], call.rope, call.width
        sample = chosen.flat // total

        def with_both(of_all: Slice, of_chosen: Slice) -> Tensor:
            if not active:
                return of_chosen.leave_bias.expand_as(into)
            samples = inputs if chosen.rows is None else inputs.index_select(0, chosen.rows)
            key, value = projections(samples, of_all, 2, attn.head_dim, chosen.rows)
            key = rotated(attn.norm_k(key), rope)
            (query,) = projections(into, of_chosen, 1, attn.head_dim, sample)
            places = chosen.flat % total
            query = rotated(attn.norm_q(query), (rope[0][places], rope[1][places]))
            mixed, start = [], 0
            for first, alike, count in chosen.segments:
                end = start + alike * count
                of_segment = query[start:end].unflatten(0, (alike, count))
                keys, values = (part[first : first + alike] for part in (key, value))
                mixed.append(block.attend(of_segment, keys, values).flatten(0, 1))
                start = end
            together = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
            return closed(together.flatten(1).to(query.dtype), of_chosen, sample)

        return self._run(
            block.keys_values,
            active,
            width,
            lambda of_all: self._run(block.queries, active, width, partial(with_both, of_all)),
        )


@dataclass(frozen=True)
class Chosen:
    """The tokens of some samples that are updated, samples with equal numbers of them side by side.

    Attributes:
        rows: The samples, or None for the whole batch in its order.
        samples: How many these are.
        flat: (R,) places of the tokens in the flattened batch, sample after sample.
        segments: First sample (a place in ``rows``), number of samples and tokens of each, where numbers are equal.
        everything: Whether these are all tokens of the batch.
    """

    rows: Tensor | None
    samples: int
    flat: Tensor
    segments: tuple[tuple[int, int, int], ...]
    everything: bool

    @classmethod
    def of(cls, updated: Tensor, counts: Sequence[int], rows: Sequence[int] | None) -> Chosen:
        """Of the (B, S) mask of tokens, its sums on the host, and some samples of the batch or all."""
        batch, total = updated.shape
        ordered = sorted(range(batch) if rows is None else rows, key=lambda row: counts[row])
        segments: list[tuple[int, int, int]] = []
        for place, row in enumerate(ordered):
            if segments and segments[-1][2] == counts[row]:
                first, number, count = segments[-1]
                segments[-1] = (first, number + 1, count)
            else:
                segments.append((place, 1, counts[row]))
        if ordered == list(range(batch)):
            flat = updated.flatten().nonzero().squeeze(1)
            everything = len(segments) == 1 and segments[0][2] == total
            return cls(None, batch, flat, tuple(segments), everything)
        index = torch.tensor(ordered, device=updated.device)
        sample, place_in_sample = updated.index_select(0, index).nonzero(as_tuple=True)
        flat = index.index_select(0, sample) * total + place_in_sample
        return cls(index, len(ordered), flat, tuple(segments), False)


def parts_of_masks(width: BlockWidth, device: torch.device) -> tuple[tuple[Part, ...], ...]:
    """Of each mask of a block, the batch cut into its distinct rows."""
    if isinstance(width, CompactWidth):
        return width.parts
    return tuple(grouped(active_units(mask.cpu()), device) for mask in width.masks)


def joint_parts(
    masks: Sequence[Sequence[Part]], batch: int
) -> list[tuple[tuple[tuple[int, ...], ...], list[int] | None]]:
    """Cut a batch by several masks at once: the active units of each, and the samples (None for all)."""
    if all(len(parts) == 1 for parts in masks):
        return [(tuple(parts[0].active for parts in masks), None)]
    active: list[list[tuple[int, ...]]] = [[()] * len(masks) for _ in range(batch)]
    for place, parts in enumerate(masks):
        for part in parts:
            for row in range(batch) if part.rows is None else part.rows.tolist():
                active[row][place] = part.active
    found: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row, units in enumerate(active):
        found.setdefault(tuple(units), []).append(row)
    return list(found.items())


def rows_of(values: Tensor, rows: Tensor | None) -> Tensor:
    """Some samples, or all of them."""
    return values if rows is None else values.index_select(0, rows)


def only_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """The (B, N) mask of some samples, zero for the others."""
    kept = torch.zeros_like(mask)
    kept[rows] = mask[rows]
    return kept


def projections(
    inputs: Tensor, weights: Slice, kinds: int, dim: int, samples: Tensor | None
) -> tuple[Tensor, ...]:
    """(S, ..., C) -> ``kinds`` times (S, ..., k, C_h), which lie side by side in each head's rows; ``samples`` as in `entered`."""
    return entered(inputs, weights, samples).unflatten(-1, (weights.units, kinds, dim)).unbind(-2)


def mlp_rows(inputs: Tensor, samples: Tensor | None, weights: Slice, biased: bool = True) -> Tensor:
    """(S, ..., C) -> (S, ..., C) through the active groups; ``samples`` as in `entered`."""
    hidden = F.gelu(entered(inputs, weights, samples), approximate="tanh")
    return closed(hidden, weights, samples, biased)


def replaced(rows: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """(R, C) rows of which some are others; each index occurs once. In place where nobody differentiates: they are this block's own."""
    if torch.is_grad_enabled():
        return rows.index_copy(0, index, values)
    return rows.index_copy_(0, index, values)
