"""Scores become orders: rank 0 is the most important unit."""

from __future__ import annotations

import torch

from dydit_cli.conversion.order import order_units

HEAD_SCORES = torch.tensor([[0.1, 3.0, 2.0]])
CHANNEL_SCORES = torch.tensor([[1.0, 9.0, 2.0, 8.0, 7.0, 3.0]])


def test_heads_are_ordered_by_falling_score() -> None:
    order = order_units(HEAD_SCORES, CHANNEL_SCORES, num_groups=3, grouping="sorted")
    assert order.heads.tolist() == [[1, 2, 0]]


def test_sorted_groups_hold_the_best_channels_first() -> None:
    order = order_units(HEAD_SCORES, CHANNEL_SCORES, num_groups=3, grouping="sorted")
    assert order.channels.tolist() == [[1, 3, 4, 5, 2, 0]]


def test_contiguous_groups_keep_neighbours_together_and_sort_whole_groups() -> None:
    order = order_units(HEAD_SCORES, CHANNEL_SCORES, num_groups=3, grouping="contiguous")
    # Sums of the stored pairs: 10, 10, 10 -> ties keep the stored order; make the last pair the best.
    assert order.channels.tolist() == [[0, 1, 2, 3, 4, 5]]
    better = CHANNEL_SCORES.clone()
    better[0, 5] = 30.0
    assert order_units(HEAD_SCORES, better, 3, "contiguous").channels.tolist() == [[4, 5, 0, 1, 2, 3]]


def test_ties_keep_the_stored_order() -> None:
    order = order_units(torch.ones(1, 4), torch.ones(1, 8), num_groups=4, grouping="sorted")
    assert order.heads.tolist() == [[0, 1, 2, 3]]
    assert order.channels.tolist() == [list(range(8))]
