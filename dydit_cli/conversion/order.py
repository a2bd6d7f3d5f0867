"""From scores to the order of units: index 0 is the most important, and always on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Grouping = Literal["sorted", "contiguous"]


@dataclass(frozen=True)
class UnitOrder:
    """Stored units by rank.

    Attributes:
        heads: (L, H) int64; ``heads[l, r]`` is the stored head of rank r in block l.
        channels: (L, mlp_hidden) int64; group g of block l holds ``channels[l, g * width : (g + 1) * width]``.
        num_groups: G.
        grouping: How groups were cut.
    """

    heads: Tensor
    channels: Tensor
    num_groups: int
    grouping: Grouping


def order_units(
    head_scores: Tensor, channel_scores: Tensor, num_groups: int, grouping: Grouping
) -> UnitOrder:
    """Order the heads and channels of all blocks.

    Args:
        head_scores: (L, H).
        channel_scores: (L, mlp_hidden).
        num_groups: G, a divisor of mlp_hidden.
        grouping: ``sorted`` or ``contiguous``.
    """
    heads, channels = order_heads(head_scores), order_channels(channel_scores, num_groups, grouping)
    return UnitOrder(heads, channels, num_groups, grouping)


def order_heads(scores: Tensor) -> Tensor:
    """(L, H) scores -> (L, H) stored heads by rank; ties keep the stored order."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def order_channels(scores: Tensor, num_groups: int, grouping: Grouping) -> Tensor:
    """Order channels by score, and cut them into groups of equal size: (L, mlp_hidden) -> the same.

    ``sorted`` sorts the channels first, so that groups are unequal on purpose: the first holds the most important channels, the
    last those that are cheapest to lose. ``contiguous`` keeps neighbours of the file together, as the authors' files do, and
    sorts whole groups by their sum. Ties keep the stored order.
    """
    if grouping == "sorted":
        return scores.sort(dim=1, descending=True, stable=True).indices
    stored = torch.arange(scores.shape[1]).view(num_groups, -1)
    sums = scores.unflatten(1, (num_groups, -1)).sum(dim=2)
    by_rank = sums.sort(dim=1, descending=True, stable=True).indices
    return torch.stack([stored[groups].flatten() for groups in by_rank])
