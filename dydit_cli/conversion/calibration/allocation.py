"""Which units each range of timesteps gives up: those whose loss a multiply-accumulate saved costs least."""

from __future__ import annotations

import heapq

from torch import Tensor

ROUNDING = 1e-9
"""Of sums of shares."""


def allocate(
    table: Tensor, scores: Tensor, costs: Tensor, fixed: Tensor, nested: Tensor, lasts: Tensor, target: float
) -> Tensor:
    """Switch units off, over all blocks and ranges, in the order of score per MAC, until the mean ratio is at most the target.

    Args:
        table: (R, U) bool, what is on; units that are off stay off.
        scores: (R, U), what the loss of a range loses with a unit.
        costs: (U,), a unit's share of all MACs.
        fixed: (U,) bool, units that are never off.
        nested: (U,) bool, units that can only be off if the next one is.
        lasts: (U,) bool, the last unit of its router, which has no next one.
        target: Mean over the ranges of the share of MACs that stays on.

    Returns:
        (R, U) bool; everything but ``fixed`` is off where the target lies below what these cost.
    """
    kept = table.clone()
    ratio = float((kept.double() * costs).sum(dim=1).mean())
    worth = (scores.double() / costs).tolist()

    def free(row: int, unit: int) -> bool:
        if fixed[unit] or not kept[row, unit]:
            return False
        return not nested[unit] or bool(lasts[unit]) or not kept[row, unit + 1]

    # Ties go to the less important unit, and to the earlier range.
    queue = [
        (worth[row][unit], -unit, row)
        for row in range(len(kept))
        for unit in range(kept.shape[1])
        if free(row, unit)
    ]
    heapq.heapify(queue)
    saving = costs / len(kept)
    while queue and ratio > target + ROUNDING:
        _, negative, row = heapq.heappop(queue)
        unit = -negative
        kept[row, unit] = False
        ratio -= float(saving[unit])
        before = unit - 1
        if before >= 0 and nested[unit] and not lasts[before] and free(row, before):
            heapq.heappush(queue, (worth[row][before], -before, row))
    return kept


def ratio_of(table: Tensor, costs: Tensor) -> Tensor:
    """(R,) share of MACs that each row keeps."""
    return (table.double() * costs).sum(dim=1)
