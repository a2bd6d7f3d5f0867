"""Compact execution: slice the weights of active heads and groups, gather the tokens that are kept. Only kept units cost.

Samples of a batch that share a width run together; a batch of mixed timesteps is cut into one part a distinct width. For
inference: masks are read on the host, so no gradient reaches the routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.layers import DynamicAttention
from dydit_cli.dynamic.routers import TokenRouter
from dydit_cli.execution.interface import BlockWidth, DynamicBlock, Modulation, live_widths, modulate
from dydit_cli.execution.plan import WidthPlan
from dydit_cli.execution.slabs import SlabStore, Slice, stamp_of


@dataclass(frozen=True)
class Part:
    """Samples of a batch with one width.

    Attributes:
        active: Ranks of the active units, ascending.
        rows: Indices of the samples, or None for the whole batch.
    """

    active: tuple[int, ...]
    rows: Tensor | None


@dataclass(frozen=True)
class CompactWidth(BlockWidth):
    """A block's width with its masks read on the host."""

    head_parts: tuple[Part, ...]
    group_parts: tuple[Part, ...]


def parts_of(mask: Tensor, device: torch.device) -> tuple[Part, ...]:
    """Cut a (B, U) mask on the CPU into its distinct rows."""
    rows_by_active: dict[tuple[int, ...], list[int]] = {}
    for row, values in enumerate(mask.tolist()):
        active = tuple(unit for unit, on in enumerate(values) if on)
        rows_by_active.setdefault(active, []).append(row)
    if len(rows_by_active) == 1:
        return (Part(next(iter(rows_by_active)), None),)
    return tuple(Part(active, torch.tensor(rows, device=device)) for active, rows in rows_by_active.items())


def compact_width(width: BlockWidth, batch: int, device: torch.device) -> CompactWidth:
    """Read a width whose masks are on the CPU; masks of one row are those of every sample."""
    return CompactWidth(
        heads=width.heads.to(device).expand(batch, -1),
        groups=width.groups.to(device).expand(batch, -1),
        head_parts=parts_of(width.heads, device),
        group_parts=parts_of(width.groups, device),
    )


class CompactExecutor:
    """Runs only what is on.

    Args:
        slice_budget: Gathered weights to keep, as a multiple of the sliceable weights' bytes.
    """

    name = "compact"

    def __init__(self, slice_budget: float = 1.0) -> None:
        self._slice_budget = slice_budget
        self._store = SlabStore(slice_budget)
        self._plan: WidthPlan | None = None

    def __reduce__(self) -> tuple[type[CompactExecutor], tuple[float]]:
        """A copied or pickled model packs its own weights."""
        return CompactExecutor, (self._slice_budget,)

    @property
    def packed_bytes(self) -> int:
        """Bytes held beside the model's own: packed weights and gathered slices."""
        return self._store.packed_bytes

    def release(self) -> None:
        """Free the packed weights; the next forward packs again."""
        self._store.clear()

    @property
    def plan(self) -> WidthPlan | None:
        """The plan in use, if any."""
        return self._plan

    def make_plan(
        self,
        blocks: Sequence[DynamicBlock],
        timesteps: Tensor,
        time_embeddings: Tensor,
        gating: ThresholdGating,
        embedder: nn.Module,
    ) -> WidthPlan:
        """Decide the widths of the (S,) ``timesteps`` with their (S, C) embeddings in one call and use them from now on.

        They hold as long as the routers of ``blocks`` and the ``embedder`` that made the embeddings stay as they are.
        """
        widths = [
            BlockWidth(width.heads.cpu(), width.groups.cpu())
            for width in live_widths(blocks, time_embeddings, gating)
        ]
        entries = {
            float(t): [
                BlockWidth(width.heads[step : step + 1], width.groups[step : step + 1]) for width in widths
            ]
            for step, t in enumerate(timesteps.tolist())
        }
        source = self._plan_source(blocks, embedder)
        self._plan = WidthPlan(gating.keep_bias, entries, embedder=embedder, source=source)
        return self._plan

    @staticmethod
    def _plan_source(blocks: Sequence[DynamicBlock], embedder: nn.Module) -> tuple[object, ...]:
        routers = [router for block in blocks for router in (block.head_router, block.channel_router)]
        return tuple(stamp_of(module) for module in (embedder, *routers))

    def widths(
        self, blocks: Sequence[DynamicBlock], timestep: Tensor, time_embedding: Tensor, gating: Gating
    ) -> Sequence[BlockWidth]:
        """See `Executor`. A planned timestep asks no router."""
        self._store.drop_edited()
        batch, device = len(time_embedding), time_embedding.device
        planned = self._planned(blocks, timestep, gating)
        if planned is not None:
            return [compact_width(width, batch, device) for width in planned]
        live = live_widths(blocks, time_embedding, gating)
        # One transfer to the host for all blocks, not two a block.
        sizes = [size for width in live for size in (width.heads.shape[1], width.groups.shape[1])]
        flat = (
            torch.cat([mask for width in live for mask in (width.heads, width.groups)], dim=1).detach().cpu()
        )
        masks = flat.split(sizes, dim=1)
        return [
            CompactWidth(
                width.heads,
                width.groups,
                parts_of(masks[2 * index], device),
                parts_of(masks[2 * index + 1], device),
            )
            for index, width in enumerate(live)
        ]

    def _planned(
        self, blocks: Sequence[DynamicBlock], timestep: Tensor, gating: Gating
    ) -> Sequence[BlockWidth] | None:
        plan = self._plan
        if plan is None or not isinstance(gating, ThresholdGating) or gating.keep_bias != plan.keep_bias:
            return None
        if plan.source != self._plan_source(blocks, plan.embedder):
            self._plan = None
            return None
        return plan.find(timestep)

    def attend(self, attention: DynamicAttention, inputs: Tensor, width: BlockWidth) -> Tensor:
        """See `Executor`."""
        parts = (
            width.head_parts
            if isinstance(width, CompactWidth)
            else parts_of(width.heads.cpu(), inputs.device)
        )
        if len(parts) == 1:
            return self._attend(attention, inputs, parts[0].active)
        output = torch.empty_like(inputs)
        for part in parts:
            # Under autocast the result may be of a smaller type than the inputs.
            output[part.rows] = self._attend(attention, inputs[part.rows], part.active).to(output.dtype)
        return output

    def _attend(self, attention: DynamicAttention, inputs: Tensor, active: tuple[int, ...]) -> Tensor:
        batch, length, channels = inputs.shape
        weights = self._store.slice(attention, active)
        if not active:
            return weights.leave_bias.expand(batch, length, channels)
        qkv = F.linear(inputs, weights.entry, weights.entry_bias)
        query, key, value = (
            qkv.view(batch, length, len(active), 3, attention.head_dim).permute(3, 0, 2, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch * length, -1)
        return torch.addmm(weights.leave_bias, mixed, weights.leave).view(batch, length, channels)

    def select(self, router: TokenRouter, tokens: Tensor, gating: Gating, block: int) -> Tensor:
        """See `Executor`."""
        return gating.tokens(block, router(tokens))

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """See `Executor`."""
        parts = (
            width.group_parts
            if isinstance(width, CompactWidth)
            else parts_of(width.groups.cpu(), tokens.device)
        )
        output = tokens
        for part in parts:
            weights = self._store.slice(block.mlp, part.active)
            if part.rows is None:
                kept = keep.bool()
            else:
                kept = torch.zeros_like(keep, dtype=torch.bool)
                kept[part.rows] = keep[part.rows].bool()
            output = self._feed_forward(block, tokens, output, modulation, weights, kept)
        return output

    def _feed_forward(
        self,
        block: DynamicBlock,
        tokens: Tensor,
        output: Tensor,
        modulation: Modulation,
        weights: Slice,
        kept: Tensor,
    ) -> Tensor:
        """Add the MLP's update of the kept tokens (B, N) to ``output``."""
        batch, length, channels = tokens.shape
        flat = kept.flatten().nonzero().squeeze(1)
        if len(flat) == batch * length:
            inputs = modulate(block.norm2(tokens), modulation.shift[:, None], modulation.scale[:, None])
            update = self._mlp(inputs.flatten(0, 1), weights).view(batch, length, channels)
            return output + modulation.gate[:, None] * update
        sample = flat // length
        inputs = modulate(
            block.norm2(tokens.flatten(0, 1).index_select(0, flat)),
            modulation.shift.index_select(0, sample),
            modulation.scale.index_select(0, sample),
        )
        update = modulation.gate.index_select(0, sample) * self._mlp(inputs, weights)
        return output.flatten(0, 1).index_add(0, flat, update.to(output.dtype)).view(batch, length, channels)

    @staticmethod
    def _mlp(rows: Tensor, weights: Slice) -> Tensor:
        hidden = F.gelu(F.linear(rows, weights.entry, weights.entry_bias), approximate="tanh")
        return torch.addmm(weights.leave_bias, hidden, weights.leave)
