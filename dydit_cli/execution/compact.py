"""Compact execution: slice the weights of active heads and groups, gather the tokens that are kept. Only kept units cost.

Samples of a batch that share a width run together; a batch of mixed timesteps is cut into one part a distinct width. For
inference: masks are read on the host, so no gradient reaches the routers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.layers import DynamicAttention
from dydit_cli.dynamic.routers import TokenRouter
from dydit_cli.execution.interface import (
    BlockWidth,
    ConditionedModel,
    DynamicBlock,
    Modulation,
    RoutedBlock,
    add_gated,
    live_widths,
    modulated,
)
from dydit_cli.execution.modulation import ModulationTable, values_of_batch
from dydit_cli.execution.plan import (
    CompactWidth,
    Part,
    PlannedStep,
    WidthPlan,
    active_units,
    grouped,
    mixed,
)
from dydit_cli.execution.slabs import SlabStore
from dydit_cli.execution.slices import Slice, closed, entered
from dydit_cli.execution.streams_compact import CompactStreams
from dydit_cli.execution.units import SlicedLayer
from dydit_cli.execution.watch import Watch

Result = TypeVar("Result")

TABLE_SHARE = 0.25
TABLE_FLOOR_BYTES = 32 * 2**20


def parts_of(mask: Tensor, device: torch.device) -> tuple[Part, ...]:
    """Cut a (B, U) mask on the CPU into its distinct rows."""
    return grouped(active_units(mask), device)


class CompactExecutor(CompactStreams):
    """Runs only what is on.

    Args:
        slice_budget: Gathered weights to keep, as a multiple of the sliceable weights' bytes.
        table_budget: Bytes of adaLN values that a plan may hold; None means a quarter of the sliceable weights' bytes, and
            32 MiB for small models, whose activations take more.
    """

    name = "compact"

    def __init__(self, slice_budget: float = 1.0, table_budget: int | None = None) -> None:
        self._slice_budget = slice_budget
        self._table_budget = table_budget
        self._store = SlabStore(slice_budget)
        self._plan: WidthPlan | None = None
        self._watch: Watch | None = None
        self._labels: tuple[weakref.ref[Tensor], int, tuple[int, ...]] | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model packs its own weights."""
        return type(self), (self._slice_budget, self._table_budget)

    @property
    def packed_bytes(self) -> int:
        """Bytes held beside the model's own: packed weights and gathered slices."""
        return self._store.packed_bytes

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights copied so far, for slices and swaps; packing is not counted."""
        return self._store.copied_bytes

    def pack(self, model: ConditionedModel) -> None:
        """Pack all weights now; the first forward does so otherwise."""
        blocks = list(model.dynamic_blocks)
        self._verify(blocks, model)
        for block in blocks:
            for layer, _ in block.sliced_layers():
                self._store.slice(layer, ())

    def release(self) -> None:
        """Free the packed weights and the plan; the next forward packs again."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._store.clear()
        self._plan = self._watch = None

    @property
    def plan(self) -> WidthPlan | None:
        """The plan in use, if any."""
        return self._plan

    # ------------------------------------------------------------------ plans

    def make_plan(
        self,
        model: ConditionedModel,
        timesteps: Tensor,
        labels: Sequence[int],
        gating: ThresholdGating,
    ) -> WidthPlan:
        """Decide the widths of the (S,) ``timesteps`` in one call, choose how their weights are kept, and use both from now on.

        They hold as long as the model stays as it is. With ``labels``, the adaLN values of all pairs are computed too.
        """
        blocks = list(model.dynamic_blocks)
        with torch.inference_mode(False), torch.no_grad():
            self._verify(blocks, model)
            distinct = torch.tensor(list(dict.fromkeys(timesteps.tolist())), dtype=timesteps.dtype)
            times = distinct.to(timesteps.device)
            if not len(times):
                self._plan = WidthPlan(gating.keep_bias)
                return self._plan
            read = model.router_input(model.embed_time(times))
            live = live_widths(blocks, read, model.width_gating(times, gating))
            actives = [[active_units(mask.cpu()) for mask in width.masks] for width in live]
            steps = {
                t: PlannedStep(
                    tuple(width.row(step) for width in live),
                    tuple(tuple(units[step] for units in active) for active in actives),
                    step,
                )
                for step, t in enumerate(times.tolist())
            }
            schedule: list[tuple[SlicedLayer, list[tuple[int, ...]]]] = [
                (layer, active[place])
                for block, active in zip(blocks, actives, strict=True)
                for layer, place in block.sliced_layers()
            ]
            policies = self._store.arrange(schedule)
            budget = self._table_budget
            if budget is None:
                budget = max(TABLE_FLOOR_BYTES, int(TABLE_SHARE * self._store.slab_bytes))
            table = ModulationTable.build(model, times, labels, budget)
            self._plan = WidthPlan(gating.keep_bias, steps, table, policies)
            return self._plan

    def known(
        self, model: ConditionedModel, timesteps: Sequence[float], batch: int, gating: Gating
    ) -> Sequence[CompactWidth] | None:
        """The widths of a batch if they are known, else None. ``timesteps`` has one entry for all samples, or one for each.

        Begins a forward: what is stale is dropped here, and no later call of the forward looks again.
        """
        self._verify(list(model.dynamic_blocks), model)
        if not isinstance(gating, ThresholdGating) or not batch:
            return None
        plan = self._plan
        if plan is None:
            plan = self._plan = WidthPlan(gating.keep_bias)
        found = plan.find(gating.keep_bias, timesteps)
        if found is None:
            return None
        plan.count(hit=True)
        if found[0].position is not None:
            self._store.at(found[0].position)
        if len(found) == 1:
            return found[0].of_batch(batch)
        return mixed(found, found[0].widths[0].heads.device)

    def modulation(
        self, model: ConditionedModel, timesteps: Sequence[float], labels: tuple[int, ...], times: Tensor
    ) -> Tensor | None:
        """(B, (6L + 2) * C) adaLN values of a batch from the plan, or computed once a distinct pair of timestep and label.

        None if the batch gains nothing by either; see `StepModulation.of` for their order.
        """
        values = self.tabled(timesteps, labels)
        return values_of_batch(model, timesteps, labels, times) if values is None else values

    def tabled(self, timesteps: Sequence[float], labels: tuple[int, ...]) -> Tensor | None:
        """(B, (6L + 2) * C) adaLN values of a batch from the plan's table, if it holds them all."""
        plan = self._plan
        return plan.modulation.find(timesteps, labels) if plan is not None and plan.modulation else None

    def labels_of(self, labels: Tensor, null: int) -> tuple[int, ...]:
        """Labels on the host, those beyond the classes as the ``null`` class.

        Samplers hand over one tensor at every step. Where reading it makes the host wait for an accelerator, it is read once.
        """
        seen = self._labels
        if seen is not None and seen[0]() is labels and seen[1] == labels._version:
            return seen[2]
        found = tuple(min(int(label), null) for label in labels.tolist())
        if labels.device.type != "cpu" and not labels.is_inference():
            self._labels = (weakref.ref(labels), labels._version, found)
        return found

    def _verify(self, blocks: Sequence[RoutedBlock], model: ConditionedModel | None) -> None:
        """Forget everything if the model is not what it was."""
        roots = [cast(nn.Module, block) for block in blocks]
        if model is not None:
            roots += model.conditioning_modules()
        watch = self._watch
        if watch is not None and watch.covers(roots) and not watch.changed():
            return
        with self._lock:
            # Another thread may have been here first.
            if self._watch is watch:
                self._forget()
                self._watch = Watch(roots)

    def _remember(
        self,
        timesteps: Sequence[float],
        time_embedding: Tensor,
        keep_bias: float,
        live: Sequence[BlockWidth],
        actives: Sequence[Sequence[Sequence[tuple[int, ...]]]],
    ) -> None:
        plan = self._plan
        if plan is None:
            return
        rows_of: dict[float, list[int]] = {}
        for row, t in enumerate(timesteps):
            rows_of.setdefault(t, []).append(row)
        for t, rows in rows_of.items():
            first = rows[0]
            agreed = all(part[row] == part[first] for parts in actives for part in parts for row in rows)
            # A logit on the fence may fall on either side from row to row: then it is asked again.
            if agreed and plan.step(keep_bias, t) is None:
                time = time_embedding[first : first + 1].detach().clone()
                widths = tuple(
                    replace(BlockWidth(*(mask[first : first + 1].clone() for mask in width.masks)), time=time)
                    for width in live
                )
                active = tuple(tuple(part[first] for part in parts) for parts in actives)
                plan.remember(keep_bias, t, PlannedStep(widths, active))

    # ------------------------------------------------------------------ a forward

    def widths(
        self, blocks: Sequence[RoutedBlock], timestep: Tensor, time_embedding: Tensor, gating: Gating
    ) -> Sequence[BlockWidth]:
        """See `Executor`. Asks the routers; a model asks `known` first."""
        self._verify(blocks, None)
        device = time_embedding.device
        live = live_widths(blocks, time_embedding, gating)
        # One transfer to the host for all blocks, not two a block.
        masks = [mask for width in live for mask in width.masks]
        flat = torch.cat(masks, dim=1).detach().cpu()
        units = iter(flat.split([mask.shape[1] for mask in masks], dim=1))
        actives = [[active_units(next(units)) for _ in width.masks] for width in live]
        watch, plan = self._watch, self._plan
        # What is remembered by t must have been decided from t, which is known where the embedder is watched.
        if plan is not None and watch is not None and isinstance(gating, ThresholdGating) and len(flat):
            plan.count(hit=False)
            if len(watch.roots) > len(blocks):
                self._remember(timestep.tolist(), time_embedding, gating.keep_bias, live, actives)
        # Weights that follow the timestep are merged once where all samples share it.
        shared = len(timestep) > 0 and bool((timestep == timestep[0]).all())
        time = time_embedding[:1] if shared else time_embedding
        return [
            CompactWidth.of(width.masks, [grouped(units, device) for units in active], time)
            for width, active in zip(live, actives, strict=True)
        ]

    def _run(
        self,
        layer: SlicedLayer,
        active: tuple[int, ...],
        width: BlockWidth,
        compute: Callable[[Slice], Result],
    ) -> Result:
        """Compute with a layer's active weights at the width's timesteps, which stay where they are meanwhile."""
        if not isinstance(width, CompactWidth):
            # A width from elsewhere: nobody has looked whether the layer is as it was.
            return compute(self._store.slice(layer, active).at(width.time))
        if self._store.moves(layer):
            with self._store.leased(layer, active) as weights:
                return compute(weights.at(width.time))
        return compute(self._store.ready(layer, active).at(width.time))

    def attend(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth
    ) -> Tensor:
        """See `Executor`."""
        parts = (
            width.head_parts
            if isinstance(width, CompactWidth)
            else parts_of(width.heads.cpu(), tokens.device)
        )
        inputs = modulated(block.norm1(tokens), modulation.shift[:, None], modulation.scale[:, None])
        attention = block.attn
        if len(parts) == 1:
            update = self._run(
                attention, parts[0].active, width, partial(self._attention, attention, inputs, None)
            )
        else:
            update = torch.empty_like(inputs)
            for part in parts:
                of_part = self._run(
                    attention,
                    part.active,
                    width,
                    partial(self._attention, attention, inputs[part.rows], part.rows),
                )
                # Under autocast the result may be of a smaller type than the inputs.
                update[part.rows] = of_part.to(update.dtype)
        return add_gated(tokens, modulation.gate[:, None], update)

    @staticmethod
    def _attention(
        attention: DynamicAttention, inputs: Tensor, samples: Tensor | None, weights: Slice
    ) -> Tensor:
        batch, length, channels = inputs.shape
        if not weights.units:
            return weights.leave_bias.expand(batch, length, channels)
        qkv = entered(inputs, weights, samples)
        query, key, value = (
            qkv.view(batch, length, weights.units, 3, attention.head_dim).permute(3, 0, 2, 1, 4).unbind(0)
        )
        mixed_heads = attention.sequences.attend(query, key, value)
        return closed(mixed_heads.transpose(1, 2).flatten(2), weights, samples)

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
            if part.rows is None:
                kept = keep
            else:
                kept = torch.zeros_like(keep)
                kept[part.rows] = keep[part.rows]
            output = self._run(
                block.mlp,
                part.active,
                width,
                partial(self._feed_forward, block, tokens, output, modulation, kept),
            )
        return output

    def _feed_forward(
        self,
        block: DynamicBlock,
        tokens: Tensor,
        output: Tensor,
        modulation: Modulation,
        kept: Tensor,
        weights: Slice,
    ) -> Tensor:
        """Add the MLP's update of the kept tokens (B, N) to ``output``, in place where nobody differentiates."""
        batch, length, channels = tokens.shape
        flat = kept.flatten().nonzero().squeeze(1)
        if not len(flat):
            return output
        if len(flat) == batch * length:
            inputs = modulated(block.norm2(tokens), modulation.shift[:, None], modulation.scale[:, None])
            update = self._mlp(inputs, weights, None)
            return add_gated(output, modulation.gate[:, None], update)
        sample = flat // length
        inputs = modulated(
            block.norm2(tokens.flatten(0, 1).index_select(0, flat)),
            modulation.shift.index_select(0, sample),
            modulation.scale.index_select(0, sample),
        )
        gate = modulation.gate.index_select(0, sample)
        update = (gate * self._mlp(inputs, weights, sample)).to(output.dtype)
        rows = output.flatten(0, 1)
        if torch.is_grad_enabled():
            rows = rows.index_add(0, flat, update)
        else:
            rows.index_add_(0, flat, update)
        return rows.view(batch, length, channels)

    @staticmethod
    def _mlp(inputs: Tensor, weights: Slice, samples: Tensor | None) -> Tensor:
        hidden = F.gelu(entered(inputs, weights, samples), approximate="tanh")
        return closed(hidden, weights, samples)
