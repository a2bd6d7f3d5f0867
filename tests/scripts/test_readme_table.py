"""The README's table comes out of results.json, with the rows that have not run; without the file nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import readme_table
from scripts.reproduction.report import NOT_MEASURED


def row(arm: str, ratio: float, fd: float | None, family: str = "dit") -> dict[str, Any]:
    found: dict[str, Any] = {"family": family, "arm": arm, "lambda": ratio, "variant": ""}
    if fd is None:
        return {**found, "state": NOT_MEASURED}
    measured = {"state": "measured", "fd": fd, "fd_std": 0.1, "gmacs": 0.0421, "time_ratio": 0.6234}
    return {**found, **measured}


def verdict(statement: str, outcome: str, ratio: float | None = None) -> dict[str, Any]:
    interval = None if ratio is None else (ratio, ratio - 0.1, ratio + 0.1)
    return {"name": "H", "statement": statement, "outcome": outcome, "ratio": interval}


RESULTS: dict[str, Any] = {
    "circumstances": {
        "devices": {"a machine": 5},
        "images": 5000,
        "sampler_steps": 25,
        "cells_done": 5,
        "cells_all": 60,
    },
    "verdicts": {
        "dit": [verdict("as near as that", "missed", 1.92), verdict("farther than that", NOT_MEASURED)],
        "sit": [verdict("as near as that", "held", 1.02), verdict("as much work", "held")],
    },
    "rows": [
        row("base", 1.0, 3.0),
        row("dynamic", 0.3, None),
        row("dynamic", 0.9, None),
        row("dynamic", 0.5, 4.25),
        row("pruned-random", 0.5, 9.0),
        row("pruned-taylor", 0.5, 7.5),
        row("pruned-taylor", 0.3, None),
        row("static-control", 1.0, 3.5) | {"time_ratio": 1.0},
        row("td-lora", 0.5, 4.5),
        row("dynamic", 0.5, 6.0, "sit"),
        row("dynamic", 0.5, 4.0) | {"variant": "remedied-taylor"},
        row("dynamic", 0.3, None) | {"variant": "remedied-taylor"},
        row("dynamic", 0.5, 4.1) | {"variant": "annealed"},
        row("static-control", 1.0, 3.0) | {"variant": "remedied-twice-steps"},
        row("pruned-taylor", 0.5, 7.0) | {"variant": "remedied-taylor"},
    ],
}


def test_rows_stand_in_order_with_the_best_pruning_and_what_has_not_run() -> None:
    lines = readme_table.table(RESULTS).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:10]] == [
        ["| DiT, static control", "", "3.50 ± 0.10"],
        ["| DiT, dynamic", "0.5", "4.25 ± 0.10"],
        ["| DiT, dynamic (Taylor ranking)", "0.5", "4.00 ± 0.10"],
        ["| DiT, pruned by Taylor", "0.5", "7.50 ± 0.10"],
        ["| DiT, pruned by Taylor (Taylor ranking)", "0.5", "7.00 ± 0.10"],
        ["| DiT, dynamic", "0.3", "not measured"],
        ["| DiT, dynamic, TD-LoRA", "0.5", "4.50 ± 0.10"],
        ["| SiT, dynamic", "0.5", "6.00 ± 0.10"],
    ]
    assert lines[3].endswith("| 42.1 | 0.62 |")
    assert "5 of 60 cells" in lines[11]
    assert lines[-4:] == [
        "| claimed beforehand | DiT | SiT |",
        "| --- | --- | --- |",
        "| as near as that | missed: 1.92 | held: 1.02 |",
        "| as much work |  | held |",
    ]


def test_the_readme_has_a_place_for_it() -> None:
    page = readme_table.PAGE.read_text(encoding="utf-8")
    assert 0 < page.index(readme_table.BEGIN) < page.index(readme_table.END)


def test_without_results_the_page_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- results -->old<!-- /results -->", encoding="utf-8")
    monkeypatch.setattr(readme_table, "PAGE", page)
    monkeypatch.setattr(readme_table, "RESULTS", readme_table.ROOT / "docs" / "absent.json")
    monkeypatch.setattr("sys.argv", ["readme_table.py", "--write"])
    with pytest.raises(SystemExit, match="stays as it is"):
        readme_table.main()
    assert page.read_text(encoding="utf-8") == "<!-- results -->old<!-- /results -->"
