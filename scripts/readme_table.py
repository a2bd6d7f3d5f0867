"""Put the results into the README: a table made of docs/results.json, between two markers. Nothing in it is typed by hand.

    python scripts/readme_table.py            # print it
    python scripts/readme_table.py --write    # put it into README.md

`scripts/reproduce.py --publish` writes docs/results.json; without that file there is no table, and the README stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.pages import replace_between
from scripts.reproduction.cells import FAMILIES, core
from scripts.reproduction.remedies import REMEDIED, variant_title
from scripts.reproduction.report import NOT_MEASURED, TITLES, read_results

PAGE = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results.json"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

ALONE = ("static-control", "td-lora")
"""Arms that are shown beside the dynamic rows and the best pruning of each of their ratios."""


def table(results: Mapping[str, Any]) -> str:
    """The table, the verdicts on what was claimed beforehand, and what was measured, as Markdown."""
    around = results["circumstances"]
    lines = [
        "| | λ | Fréchet distance | MMACs a forward | time of the control |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for family, title in FAMILIES.items():
        lines += [_line(title, row) for row in chosen(results, family)]
    verdicts = [
        f"{FAMILIES[family]} {each['name']}: {each['outcome']}"
        for family, found in results["verdicts"].items()
        for each in found
        if each["outcome"] != NOT_MEASURED
    ]
    lines += [
        "",
        f"Small models of Fashion-MNIST on {', '.join(around['devices'])}; {around['images']:,} samples of {around['sampler_steps']} "
        "steps each. ± is one standard deviation, over seeds where there are several, else of sampling alone. Pruned rows are the best "
        "of up to three rankings, chosen after the fact; what stands in brackets was changed when the row above had missed, and chosen on "
        "the validation split. "
        f"{around['cells_done']} of {around['cells_all']} cells of the [protocol](docs/protocol.md) "
        "have run; "
        "[docs/results.md](docs/results.md) has all of them.",
    ]
    if verdicts:
        lines += ["", f"Of what was claimed beforehand: {'; '.join(verdicts)}."]
    return "\n".join(lines)


def chosen(results: Mapping[str, Any], family: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a family that the README shows: dynamic ones, each with its remedy and then the best pruning of its ratio behind it.

    Rows of the protocol's core that have not run are among them.
    """
    needed = {cell.row for cell in core()}
    rows = [
        row
        for row in results["rows"]
        if row["family"] == family
        and not row["variant"]
        and (row["state"] != NOT_MEASURED or (family, row["arm"], row["lambda"], "") in needed)
    ]
    remedied = [
        row
        for row in results["rows"]
        if row["family"] == family
        and row["arm"] == "dynamic"
        and row["variant"].startswith(REMEDIED)
        and row["state"] != NOT_MEASURED
    ]
    yield from (row for row in rows if row["arm"] == ALONE[0])
    for row in sorted((row for row in rows if row["arm"] == "dynamic"), key=lambda row: -row["lambda"]):
        yield row
        yield from (each for each in remedied if each["lambda"] == row["lambda"])
        pruned = [
            each
            for each in rows
            if each["arm"].startswith("pruned-")
            and each["lambda"] == row["lambda"]
            and each["state"] != NOT_MEASURED
        ]
        yield from sorted(pruned, key=lambda each: each["fd"])[:1]
    yield from (row for row in rows if row["arm"] in ALONE[1:])


def _line(family: str, row: Mapping[str, Any]) -> str:
    title = f"{family}, {TITLES.get(row['arm'], row['arm'])}"
    if row["variant"]:
        title += f" ({variant_title(row['variant'])})"
    ratio = "" if row["arm"] == ALONE[0] else f"{row['lambda']:g}"
    if row["state"] == NOT_MEASURED:
        return f"| {title} | {ratio} | {NOT_MEASURED} | | |"
    time = "" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}"
    return (
        f"| {title} | {ratio} | {row['fd']:.2f} ± {row['fd_std']:.2f} | {row['gmacs'] * 1e3:.1f} | {time} |"
    )


def main() -> None:
    """Print the table, or put it into the README."""
    if not RESULTS.exists():
        raise SystemExit(
            f"There is no {RESULTS.relative_to(ROOT)}; `python scripts/reproduce.py --data FOLDER --publish` writes it. "
            f"{PAGE.name} stays as it is."
        )
    text = table(read_results(RESULTS))
    if "--write" in sys.argv[1:]:
        replace_between(PAGE, BEGIN, END, text)
        return
    print(text)


if __name__ == "__main__":
    main()
