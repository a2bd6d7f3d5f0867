"""The table of compositions has a row for each, and reads as measured."""

from __future__ import annotations

from scripts.measure_composition import ADDITIONS, DYNAMIC, STATIC, TOGETHER, Found, Row, table


def test_every_addition_stands_alone_and_with_every_other() -> None:
    assert TOGETHER[0] == ()
    assert len(set(TOGETHER)) == len(TOGETHER) == 2 ** len(ADDITIONS)


def test_a_row_says_what_was_measured() -> None:
    base = Found(1.0, 0.1, (1.0, 1.0, 1.0), 4 * 2**20, 0, (7.0, 6.0, 8.0), None)
    other = Found(0.5, 0.06, (0.6, 0.55, 0.65), 2**20, 2**19, (8.0, 7.0, 9.0), (30.0, 29.0, 31.0))
    found = {Row(STATIC, ()): base, Row(DYNAMIC, ADDITIONS[:2]): other}
    _, _, first, second = table(found).splitlines()
    assert first == "| static | nothing | 1.000 | 100.0 | 1.000 (1.000–1.000) | 4.00 | 7.00 (6.00–8.00) | – |"
    assert second == (
        "| dynamic | first-block cache, int8 weights | 0.500 | 60.0 | 0.600 (0.550–0.650) | 1.00 + 0.50 | 8.00 (7.00–9.00) | "
        "30.0 (29.0–31.0) |"
    )
