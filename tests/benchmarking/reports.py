"""Reports for tests that need one without measuring."""

from __future__ import annotations

from typing import Any

from dydit_cli.benchmarking.report import BenchReport, Row, row_of


def row(**changes: Any) -> Row:
    """A row: compact takes 0.55 of static in every round."""
    seconds: dict[str, list[float]] = {
        "static": [1.0, 2.0, 1.5],
        "diffusers": [1.1, 2.2, 1.65],
        "dense": [1.2, 2.4, 1.8],
        "compact": [0.55, 1.1, 0.825],
    }
    facts: dict[str, Any] = {
        "ideal": 0.495,
        "case": "8/16 heads, 11/16 groups, 70% of tokens",
        "batch": 4,
        "steps": None,
        "heads": 0.5,
        "groups": 0.6875,
        "tokens": 0.7,
        "ratio": 0.488,
        "difference_to_dense": 1e-7,
    }
    seconds |= changes.pop("seconds", {})
    return row_of(seconds, **(facts | changes))


def report(*rows: Row, **changes: Any) -> BenchReport:
    """A report of rows."""
    content: dict[str, Any] = {
        "rows": list(rows),
        "title": "dit-xl/2, 2 of 28 blocks",
        "note": "random weights",
        "model": {"family": "dit"},
        "clock": "cpu",
        "threads": 1,
        "device": "cpu (x86_64, 1 threads)",
        "dtype": "float32",
        "versions": {"torch": "2.13.0"},
        "settings": {"model": None, "seed": 0},
    }
    return BenchReport(**(content | changes))
