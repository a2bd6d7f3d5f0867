"""Paired timing: order, clock, medians, intervals."""

from __future__ import annotations

from itertools import count

import pytest

from dydit_cli.profiling.timing import interleaved, paired_ratio


def test_rounds_alternate_their_order_after_the_warm_up() -> None:
    ran: list[str] = []
    sides = {name: lambda name=name: ran.append(name) for name in "abc"}
    interleaved(sides, 3, warmups=1)
    assert "".join(ran) == "abc" + "abc" + "cba" + "abc"


def test_seconds_are_those_of_the_clock() -> None:
    ticks = count()
    cost = {"slow": 3, "fast": 1}

    def run(name: str) -> None:
        for _ in range(cost[name]):
            next(ticks)

    seconds = interleaved(
        {name: lambda name=name: run(name) for name in cost}, 4, clock=lambda: float(next(ticks))
    )
    assert seconds == {"slow": [4.0] * 4, "fast": [2.0] * 4}


def test_the_ratio_survives_a_machine_that_gets_slower() -> None:
    """Each pair shares its speed; a ratio of the sums, or of two separate medians, would be off."""
    speed = [1.0, 1.1, 1.3, 2.0, 5.0, 9.0, 9.5]
    found = paired_ratio([0.5 * s for s in speed], speed)
    assert found.ratio == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    assert found.pairs == 7


def test_one_disturbed_pair_does_not_move_the_median() -> None:
    found = paired_ratio([0.5, 0.5, 50.0, 0.5, 0.5], [1.0] * 5)
    assert found.ratio == 0.5


def test_the_interval_holds_the_median_and_widens_with_the_spread() -> None:
    steady = paired_ratio([0.49, 0.5, 0.51, 0.5, 0.5, 0.49, 0.51], [1.0] * 7)
    shaky = paired_ratio([0.2, 0.5, 0.9, 0.4, 0.6, 0.3, 0.8], [1.0] * 7)
    for found in (steady, shaky):
        assert found.low <= found.ratio <= found.high
    assert shaky.high - shaky.low > 5 * (steady.high - steady.low)
    assert shaky == paired_ratio([0.2, 0.5, 0.9, 0.4, 0.6, 0.3, 0.8], [1.0] * 7)
