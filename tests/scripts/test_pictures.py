"""Names beside the points of a plot."""

from __future__ import annotations

import pytest

from scripts.reproduction.pictures import apart


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([], []),
        ([5.0, 100.0], [5.0, 100.0]),
        ([2.0, 0.0, 1.0], [10.0, -8.0, 1.0]),
        ([0.0, 8.0, 30.0, 31.0], [-0.5, 8.5, 26.0, 35.0]),
        # Two groups that touch once each has been spread.
        ([0.0, 0.0, 8.0, 8.0], [-9.5, -0.5, 8.5, 17.5]),
    ],
)
def test_neighbours_move_apart_and_keep_their_mean(positions: list[float], expected: list[float]) -> None:
    assert apart(positions, 9.0) == pytest.approx(expected)
