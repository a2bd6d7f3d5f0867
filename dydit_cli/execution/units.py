"""Weights of a dynamic layer by unit, sorted by rank: which rows and columns of which linear layers belong to a head or group.

Each kind of layer whose weights are sliced registers with `unit_layers` what it consists of; `pack` does the rest. Where a linear
layer's weight follows the timestep, its factors of low rank are cut in the same way: rows of the experts where units are rows,
columns of A where units are columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.layers import DynamicAttention, DynamicMlp
from dydit_cli.dynamic.timed import TimedFactor, TimedLayer
from dydit_cli.execution.effective import as_stored


class SlicedLayer(Protocol):
    """A module, or a part of modules, whose weights are sliced by unit; `unit_layers` says how."""

    def modules(self) -> Iterator[nn.Module]:
        """Everything whose own tensors it computes with."""
        ...


@dataclass(frozen=True)
class UnitLayers:
    """The linear layers of a sliced layer.

    Attributes:
        units: Heads or groups.
        order: The stored heads or channels, by rank.
        opening: Layers whose rows belong to units.
        closing: The layer whose columns do, if there is one.
        kinds: Matrices that stand one below the other in each opening layer, as q, k and v do where they are fused.
        columns: Which of the closing layer's columns count; None means all.
    """

    units: int
    order: Tensor
    opening: tuple[nn.Module, ...]
    closing: nn.Module | None = None
    kinds: int = 1
    columns: slice | None = None

    def rows_by_unit(self, rows: Tensor) -> Tensor:
        """(R, X) stored rows of an opening layer -> (U, R / U, X) by rank, the matrices of a unit side by side."""
        return torch.cat([by_unit(part, self.order, self.units) for part in rows.chunk(self.kinds)], dim=1)

    def columns_by_unit(self, columns: Tensor) -> Tensor:
        """(X, R) stored columns of the closing layer -> (U, rows', X) by rank, transposed."""
        chosen = columns if self.columns is None else columns[:, self.columns]
        return by_unit(chosen.t(), self.order, self.units)


@singledispatch
def unit_layers(layer: SlicedLayer) -> UnitLayers:
    """What a layer consists of now; each kind of layer whose weights are sliced registers it."""
    raise TypeError(f"{type(layer).__qualname__} has no units")


@unit_layers.register
def units_of_attention(attention: DynamicAttention) -> UnitLayers:
    """Heads, whose queries, keys and values are fused."""
    return UnitLayers(attention.num_heads, attention.head_order, (attention.qkv,), attention.proj, kinds=3)


@unit_layers.register
def units_of_mlp(mlp: DynamicMlp) -> UnitLayers:
    """Groups of channels."""
    return UnitLayers(mlp.num_groups, mlp.channel_order, (mlp.fc1,), mlp.fc2)


def by_unit(rows: Tensor, order: Tensor, units: int) -> Tensor:
    """(R, X) stored rows -> (U, R / U, X) by rank; ``order`` names heads of several rows or single rows."""
    grouped = rows.reshape(len(order), -1, rows.shape[1]).index_select(0, order)
    return grouped.view(units, -1, rows.shape[1])


def from_units(values: Tensor, order: Tensor) -> Tensor:
    """(U, R / U, X) by rank -> (R, X) as stored: the inverse of `by_unit`."""
    grouped = values.reshape(len(order), -1, values.shape[2])
    return torch.empty_like(grouped).index_copy_(0, order, grouped).flatten(0, 1)


@dataclass(frozen=True)
class LowRank:
    """What the timestep adds to a weight by unit: (left * a(t)) @ right; experts of all factors stand side by side, Q in all.

    Attributes:
        left: (U, rows, Q); of a slice, (k * rows, Q).
        right: (Q, C).
        factors: Whose gates say what a(t) is; all of one rank and number of experts.
        experts_left: Whether the experts stand in ``left``, and ``right`` repeats A once for each; else the other way round.
    """

    left: Tensor
    right: Tensor
    factors: tuple[TimedFactor, ...]
    experts_left: bool

    def mixed(self, amounts: Tensor) -> tuple[Tensor, Tensor]:
        """(1, Q) amounts of one timestep -> (rows, R) and (R, C), whose product a slice's weight is added: experts summed up."""
        experts, _, rank = self.factors[0].experts.shape
        shape = (len(self.factors), experts, rank)
        left, right = self.left.unflatten(1, shape), self.right.unflatten(0, shape)
        if self.experts_left:
            left, right = (left * amounts.view(shape)).sum(dim=2), right[:, 0]
        else:
            left, right = left[:, :, 0], (right * amounts.view(*shape, 1)).sum(dim=1)
        return left.flatten(1), right.flatten(0, 1)

    def amounts(self, time_embedding: Tensor) -> Tensor:
        """(B, C) timestep embeddings -> (B, Q), a(t) of every column of ``left``."""
        found = [
            factor.mixture(time_embedding).repeat_interleave(factor.experts.shape[2], dim=1)
            for factor in self.factors
        ]
        return (found[0] if len(found) == 1 else torch.cat(found, dim=1)).to(self.left.dtype)


@dataclass(frozen=True)
class Slabs:
    """Weights by unit in rank order; the first axis of each is the unit.

    Attributes:
        entry: (U, rows, C) rows of the layers that open (qkv or fc1).
        entry_bias: (U, rows).
        leave: (U, rows', C) transposed columns of the layer that closes (output projection or fc2).
        leave_bias: (C,), never sliced.
        entry_timed: What the timestep adds to ``entry``.
        leave_timed: The same of ``leave``.
        entry_scale: (U, rows), what rows of ``entry`` are multiplied with where they are kept in int8.
        leave_scale: (C,), the same of ``leave``; never sliced.
    """

    entry: Tensor
    entry_bias: Tensor
    leave: Tensor
    leave_bias: Tensor
    entry_timed: LowRank | None = None
    leave_timed: LowRank | None = None
    entry_scale: Tensor | None = None
    leave_scale: Tensor | None = None

    @property
    def by_units(self) -> tuple[Tensor, ...]:
        """Everything with an axis of units."""
        timed = (self.entry_timed, self.leave_timed)
        scales = () if self.entry_scale is None else (self.entry_scale,)
        lefts = (part.left for part in timed if part is not None)
        return (self.entry, self.entry_bias, self.leave, *scales, *lefts)

    @property
    def nbytes(self) -> int:
        """Bytes of the sliceable weights."""
        return sum(part.numel() * part.element_size() for part in self.by_units)

    def map(self, change: Callable[[Tensor], Tensor]) -> Slabs:
        """The same change made to everything with an axis of units."""

        def changed(part: LowRank | None) -> LowRank | None:
            return None if part is None else replace(part, left=change(part.left))

        return Slabs(
            change(self.entry),
            change(self.entry_bias),
            change(self.leave),
            self.leave_bias,
            changed(self.entry_timed),
            changed(self.leave_timed),
            None if self.entry_scale is None else change(self.entry_scale),
            self.leave_scale,
        )


def pack(layer: SlicedLayer) -> Slabs:
    """Pack a layer's weights by unit.

    Raises:
        DyditError: If the layer holds more than plain weights.
    """
    found = unit_layers(layer)
    opened = [as_stored(opening) for opening in found.opening]
    if any(scale is None for _, _, scale in opened):
        # Side by side they have one type.
        opened = [
            (weight if scale is None else weight * scale[:, None], bias, None)
            for weight, bias, scale in opened
        ]
    entry = torch.cat([found.rows_by_unit(weight) for weight, _, _ in opened], dim=1)
    biases = [found.rows_by_unit(bias[:, None]).squeeze(2) for _, bias, _ in opened]
    scales = [found.rows_by_unit(scale[:, None]).squeeze(2) for _, _, scale in opened if scale is not None]
    entry_bias, leave_scale = torch.cat(biases, dim=1), None
    if found.closing is None:
        leave = entry_bias.new_empty(found.units, 0, entry.shape[2])
        leave_bias = entry_bias.new_zeros(entry.shape[2])
    else:
        weight, leave_bias, leave_scale = as_stored(found.closing)
        leave = found.columns_by_unit(weight)
    return Slabs(
        entry,
        entry_bias,
        leave,
        leave_bias,
        entry_timed(found, [len(weight) // found.units for weight, _, _ in opened]),
        leave_timed(found),
        torch.cat(scales, dim=1) if scales else None,
        leave_scale,
    )


def with_timed(slabs: Slabs, found: UnitLayers, index: Tensor) -> Slabs:
    """The slabs, in the order ``index`` of ranks, with what the timestep adds to the layers now."""
    if slabs.entry_timed is None and slabs.leave_timed is None:
        return slabs
    heights = [len(layer.get_parameter("weight")) // found.units for layer in found.opening]
    timed = [
        None if part is None else replace(part, left=part.left.index_select(0, index))
        for part in (entry_timed(found, heights), leave_timed(found))
    ]
    return replace(slabs, entry_timed=timed[0], leave_timed=timed[1])


def factors_of(layer: nn.Module | None) -> Sequence[TimedFactor]:
    """What follows the timestep in a layer."""
    return layer.timed_factors() if isinstance(layer, TimedLayer) else ()


def entry_timed(found: UnitLayers, heights: Sequence[int]) -> LowRank | None:
    """Of the opening layers, of which a unit has so many rows: the experts' rows by unit, each in the rows of its own layer."""
    pieces: list[tuple[int, Tensor]] = []
    rights, factors, row = [], [], 0
    for layer, height in zip(found.opening, heights, strict=True):
        for factor in factors_of(layer):
            by_expert = [found.rows_by_unit(expert) for expert in factor.experts]
            pieces.append((row, torch.cat(by_expert, dim=2)))
            rights.append(factor.first.repeat(len(factor.experts), 1))
            factors.append(factor)
        row += height
    if not pieces:
        return None
    right = torch.cat(rights)
    left = right.new_zeros(found.units, row, len(right))
    column = 0
    for first, piece in pieces:
        left[:, first : first + piece.shape[1], column : column + piece.shape[2]] = piece
        column += piece.shape[2]
    return LowRank(left, right, tuple(factors), experts_left=True)


def leave_timed(found: UnitLayers) -> LowRank | None:
    """Of the closing layer: the columns of A by unit, once an expert."""
    factors = tuple(factors_of(found.closing))
    if not factors:
        return None
    lefts = [found.columns_by_unit(factor.first).repeat(1, 1, len(factor.experts)) for factor in factors]
    rights = [factor.experts.transpose(1, 2).flatten(0, 1) for factor in factors]
    return LowRank(torch.cat(lefts, dim=2), torch.cat(rights), factors, experts_left=False)
