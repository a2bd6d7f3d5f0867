"""Token selection without asking the device how many tokens are kept: static shapes for CUDA graphs, in plain torch.

Gathering needs the number of kept tokens on the host, which on a GPU makes the host wait in every block and rules out CUDA graphs.
Here every block's MLP has room for a fixed number of tokens, its capacity: the kept ones in their order, then others, whose update
is zero. Where more are kept than there is room for, the update of the rest is missing, and a flag on the device says so. The flags
of a step are read together, once, at its end; if one is set, the step is repeated with gathering. So the result is right in any
case, and what an overflow costs is time.

For CPUs gathering is the better choice: waiting costs nothing there, and room that is not used still costs multiplications. None of
this was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.execution.compact import CompactExecutor
from dydit_cli.execution.interface import BlockWidth, DynamicBlock, Modulation, Step, StepRunner, modulate
from dydit_cli.execution.plan import CompactWidth
from dydit_cli.execution.slices import Slice, closed, entered

ROW_MULTIPLE = 8
"""Capacities are rounded up to a multiple of this, as matrix units like it."""


class Selection(NamedTuple):
    """Rows of a static shape.

    Attributes:
        rows: (capacity,) distinct indices: those that are kept in ascending order, then others in ascending order.
        valid: (capacity,) whether each is kept.
        overflow: () whether kept ones are missing.
    """

    rows: Tensor
    valid: Tensor
    overflow: Tensor


def capacity_of(share: float, tokens: int) -> int:
    """Room for ``share`` of ``tokens``, rounded up, and no more than there are."""
    wanted = math.ceil(share * tokens)
    return min(tokens, -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE)


def select_rows(keep: Tensor, capacity: int) -> Selection:
    """The first ``capacity`` entries of a stable partition of (R,) bool ``keep``: kept ones first. No value reaches the host."""
    kept = keep.long()
    total = kept.sum()
    # Where each goes: two running counts, which is a stable sort by one bit.
    place = torch.where(keep, kept.cumsum(0) - 1, total + (1 - kept).cumsum(0) - 1)
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(keep), device=keep.device))
    index = order[:capacity]
    return Selection(index, keep.index_select(0, index), total > capacity)


def group_rows(inputs: Tensor, weights: Slice, samples: Tensor | None) -> Tensor:
    """(S, ..., C) through the active groups of an MLP; ``samples`` (S,) says to which sample of the batch each belongs."""
    return closed(F.gelu(entered(inputs, weights, samples), approximate="tanh"), weights, samples)


def update_with_capacity(
    block: DynamicBlock,
    tokens: Tensor,
    modulation: Modulation,
    keep: Tensor,
    capacity: int,
    samples: Tensor | None,
    weights: Slice,
) -> tuple[Tensor, Tensor]:
    """tokens + keep * gate * MLP(modulate(LN(tokens))) for the first ``capacity`` kept tokens, and whether some are missing.

    Args:
        block: Gives the LayerNorm.
        tokens: (B, N, C).
        modulation: Each (B, C).
        keep: (B, N) bool.
        capacity: Tokens of the batch that there is room for.
        samples: (B,) which samples of the whole batch these are; None if they are the batch.
        weights: The active groups.
    """
    batch, length, channels = tokens.shape
    flat = tokens.reshape(batch * length, channels)
    found = select_rows(keep.reshape(-1), capacity)
    sample = found.rows // length
    before = flat.index_select(0, found.rows)
    inputs = modulate(
        block.norm2(before),
        modulation.shift.index_select(0, sample),
        modulation.scale.index_select(0, sample),
    )
    of_batch = sample if samples is None else samples.index_select(0, sample)
    update = modulation.gate.index_select(0, sample) * group_rows(inputs, weights, of_batch)
    # Chosen, not multiplied: a token that is not kept may have an update that is not finite.
    after = torch.where(found.valid[:, None], (before + update).to(flat.dtype), before)
    return flat.index_copy(0, found.rows, after).view(batch, length, channels), found.overflow


def update_all(
    block: DynamicBlock,
    tokens: Tensor,
    modulation: Modulation,
    keep: Tensor,
    samples: Tensor | None,
    weights: Slice,
) -> Tensor:
    """The same with room for all tokens: none is moved, and those that are not kept stay as they were."""
    inputs = modulate(block.norm2(tokens), modulation.shift[:, None], modulation.scale[:, None])
    update = modulation.gate[:, None] * group_rows(inputs, weights, samples)
    return torch.where(keep[:, :, None], (tokens + update).to(tokens.dtype), tokens)


@dataclass
class Overflow:
    """The room of a forward's blocks, and their flags, which stay on the device until somebody asks.

    Attributes:
        rooms: Tokens that there is room for, by the identity of the MLP; for others the executor's share counts.
        flags: Whether there were more, one a block so far.
    """

    rooms: Mapping[int, int] = field(default_factory=dict)
    flags: list[Tensor] = field(default_factory=list)

    def flag(self) -> Tensor | None:
        """() whether any block had more tokens than room, on the device; None if no block asked."""
        return torch.stack(self.flags).any() if self.flags else None

    def happened(self) -> bool:
        """The same on the host. This waits for the device."""
        flag = self.flag()
        return flag is not None and bool(flag)


class CapacityExecutor(CompactExecutor, StepRunner):
    """Compact execution whose token selection has static shapes; a step in which the room was too small is run again and gathers.

    Args:
        share: Of a batch's tokens, how many each block's MLP has room for; 1 never overflows and saves no token.
        slice_budget: See `CompactExecutor`.
        table_budget: See `CompactExecutor`.

    Attributes:
        overflows: Steps that had to be repeated.

    Raises:
        DyditError: If ``share`` is not in (0, 1].
    """

    def __init__(self, share: float, slice_budget: float = 1.0, table_budget: int | None = None) -> None:
        if not 0 < share <= 1:
            raise DyditError(
                f"A capacity of {share:g} of the tokens is not possible.",
                why="It is the share of tokens that there is room for.",
                fix="Pass a number above 0 and up to 1, a little above the share of tokens that the model keeps.",
            )
        super().__init__(slice_budget, table_budget)
        self.share = share
        self.overflows = 0
        self._running: ContextVar[Overflow | None] = ContextVar("running", default=None)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model packs its own weights."""
        return type(self), (self.share, self._slice_budget, self._table_budget)

    def run_step(self, step: Step) -> tuple[Tensor, ...]:
        """See `StepRunner`. The host waits for the device once, at the end."""
        with self.static_shapes() as overflow:
            outputs = step.run()
        if not overflow.happened():
            return outputs
        self.count_overflow()
        return step.run()

    def count_overflow(self) -> None:
        """Note that a step is repeated."""
        with self._lock:
            self.overflows += 1

    @contextmanager
    def static_shapes(self, rooms: Mapping[int, int] | None = None) -> Iterator[Overflow]:
        """Inside, shapes are static; what comes out collects the flags, and the result holds only if none of them is set.

        Args:
            rooms: See `Overflow`.
        """
        overflow = Overflow(rooms or {})
        before = self._running.set(overflow)
        try:
            yield overflow
        finally:
            self._running.reset(before)

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """See `Executor`."""
        overflow = self._running.get()
        if overflow is None or not isinstance(width, CompactWidth):
            return super().feed_forward(block, tokens, modulation, width, keep)
        output = tokens
        for part in width.group_parts:
            chosen, values, kept = tokens, modulation, keep.bool()
            if part.rows is not None:
                chosen, kept = tokens[part.rows], kept[part.rows]
                values = Modulation(*(v[part.rows] for v in (values.shift, values.scale, values.gate)))
            capacity = overflow.rooms.get(id(block.mlp), 0) if part.rows is None else 0
            capacity = capacity or capacity_of(self.share, kept.numel())
            if capacity < kept.numel():
                run = partial(update_with_capacity, block, chosen, values, kept, capacity, part.rows)
                updated, flag = self._run(block.mlp, part.active, width, run)
                overflow.flags.append(flag)
            else:
                updated = self._run(
                    block.mlp, part.active, width, partial(update_all, block, chosen, values, kept, part.rows)
                )
            output = updated if part.rows is None else output.index_copy(0, part.rows, updated)
        return output
