"""The active part of a layer's weights, and the two products that are made with it.

Where a weight follows the timestep, samples that share one get it merged: into a copy of the slice, afresh from the stored weight
at every step. For samples of several timesteps the factors of low rank are applied beside the product, to each its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.dynamic.timed import needed
from dydit_cli.execution.policies import ActiveUnits
from dydit_cli.execution.units import LowRank, Slabs


@dataclass(frozen=True)
class Slice:
    """The active part of a layer: (k * rows, C), (k * rows,), (k * rows', C), (C,); ``units`` is k.

    Attributes:
        units: k.
        entry: Rows of the layers that open.
        entry_bias: Their biases.
        leave: Transposed columns of the layer that closes.
        leave_bias: Its bias.
        entry_timed: What the timestep adds to ``entry``.
        leave_timed: The same of ``leave``.
        amounts: (B, Q) of each of the two, for samples of several timesteps; see `at`.
        entry_scale: (k * rows,), what is multiplied with what comes through ``entry``, where that is kept in int8.
        leave_scale: (C,), the same of ``leave``.
    """

    units: int
    entry: Tensor
    entry_bias: Tensor
    leave: Tensor
    leave_bias: Tensor
    entry_timed: LowRank | None = None
    leave_timed: LowRank | None = None
    amounts: tuple[Tensor | None, Tensor | None] = (None, None)
    entry_scale: Tensor | None = None
    leave_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the sliced weights."""
        timed = [part.left for part in (self.entry_timed, self.leave_timed) if part is not None]
        scales = [] if self.entry_scale is None else [self.entry_scale]
        parts = (self.entry, self.entry_bias, self.leave, *scales, *timed)
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def is_timed(self) -> bool:
        """Whether its weights still wait for the timestep, or are another's for each sample."""
        return self.entry_timed is not None or self.leave_timed is not None

    def in_floats(self) -> Slice:
        """The same with int8 values as floats, a copy; their scales stay apart."""
        entry, leave = self.entry, self.leave
        if self.entry_scale is not None:
            entry = entry.to(self.entry_scale.dtype)
        if self.leave_scale is not None:
            leave = leave.to(self.leave_scale.dtype)
        return (
            self if entry is self.entry and leave is self.leave else replace(self, entry=entry, leave=leave)
        )

    def scaled(self) -> Slice:
        """The same with the scales multiplied in."""
        if self.entry_scale is None and self.leave_scale is None:
            return self
        entry, leave = self.entry, self.leave
        if self.entry_scale is not None:
            entry = entry * self.entry_scale[:, None]
        if self.leave_scale is not None:
            leave = leave * self.leave_scale
        return replace(self, entry=entry, leave=leave, entry_scale=None, leave_scale=None)

    def at(self, time_embedding: Tensor | None) -> Slice:
        """The weights at a timestep, merged, if there is one row of (B, C) embeddings; else what `entered` and `closed` need.

        Raises:
            TypeError: Without the embedding, if weights follow it.
        """
        if not self.is_timed:
            return self.in_floats()
        scaled = self.scaled()
        if scaled is not self:
            return scaled.at(time_embedding)
        times = needed(time_embedding)
        of_entry, of_leave = self.entry_timed, self.leave_timed
        amounts = (
            None if of_entry is None else of_entry.amounts(times),
            None if of_leave is None else of_leave.amounts(times),
        )
        if len(times) != 1:
            return replace(self, amounts=amounts)
        return replace(
            self,
            entry=merged(self.entry, of_entry, amounts[0]),
            leave=merged(self.leave, of_leave, amounts[1]),
            entry_timed=None,
            leave_timed=None,
        )


def merged(weight: Tensor, timed: LowRank | None, amounts: Tensor | None) -> Tensor:
    """(rows, C) weights with what one timestep adds to them: a copy, or themselves where nothing does."""
    if timed is None or amounts is None:
        return weight
    return torch.addmm(weight, *timed.mixed(amounts))


def prefix_slice(slabs: Slabs, units: int) -> Slice:
    """The ``units`` most important units, as views."""
    return _slice(slabs.map(lambda part: part[:units].flatten(0, 1)), units)


def gathered_slice(slabs: Slabs, active: ActiveUnits) -> Slice:
    """The units at the places ``active``, as a copy."""
    index = torch.tensor(active, device=slabs.entry.device, dtype=torch.long)
    return _slice(slabs.map(lambda part: part.index_select(0, index).flatten(0, 1)), len(active))


def _slice(flat: Slabs, units: int) -> Slice:
    return Slice(
        units,
        flat.entry,
        flat.entry_bias,
        flat.leave,
        flat.leave_bias,
        flat.entry_timed,
        flat.leave_timed,
        entry_scale=flat.entry_scale,
        leave_scale=flat.leave_scale,
    )


def entered(inputs: Tensor, weights: Slice, samples: Tensor | None = None) -> Tensor:
    """(S, ..., C) -> (S, ..., k * rows) through the layers that open.

    Args:
        inputs: S samples, or S tokens of them.
        weights: The active part.
        samples: (S,) to which sample of the batch each belongs; None if they are the batch.
    """
    if weights.entry_scale is None:
        result = F.linear(inputs, weights.entry, weights.entry_bias)
    else:
        product = F.linear(inputs, weights.entry)
        result = (product * weights.entry_scale + weights.entry_bias).to(product.dtype)
    timed, amounts = weights.entry_timed, weights.amounts[0]
    if timed is None or amounts is None:
        return result
    reduced = F.linear(inputs, timed.right) * per_sample(amounts, samples, inputs.ndim)
    return result + F.linear(reduced, timed.left)


def closed(inputs: Tensor, weights: Slice, samples: Tensor | None = None, biased: bool = True) -> Tensor:
    """(S, ..., k * rows') -> (S, ..., C) through the layer that closes; see `entered`."""
    rows = inputs.flatten(0, -2)
    if weights.leave_scale is not None:
        product = rows @ weights.leave
        scaled = product * weights.leave_scale
        result = (scaled + weights.leave_bias if biased else scaled).to(product.dtype)
    else:
        result = torch.addmm(weights.leave_bias, rows, weights.leave) if biased else rows @ weights.leave
    result = result.unflatten(0, inputs.shape[:-1])
    timed, amounts = weights.leave_timed, weights.amounts[1]
    if timed is None or amounts is None:
        return result
    return result + ((inputs @ timed.left) * per_sample(amounts, samples, inputs.ndim)) @ timed.right


def per_sample(amounts: Tensor, samples: Tensor | None, dimensions: int) -> Tensor:
    """(B, Q) of a batch -> (S, 1, ..., Q) of some samples, with as many dimensions."""
    chosen = amounts if samples is None else amounts.index_select(0, samples)
    return chosen.view(len(chosen), *(1,) * (dimensions - 2), -1)
