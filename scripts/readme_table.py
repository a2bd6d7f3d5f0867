"""Put the results into the README: a table made of docs/results.json, between two markers. Nothing in it is typed by hand.

    python scripts/readme_table.py            # print it
    python scripts/readme_table.py --write    # put it into README.md

`scripts/reproduce.py --publish` writes docs/results.json; without that file there is no table, and the README stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dydit_cli.cli.chatter import hush

hush()

from scripts.pages import replace_between
from scripts.reproduction.cells import FAMILIES, core
from scripts.reproduction.remedies import PRUNED_TWIN, REMEDIED, variant_title
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
    lines += [
        "",
        f"Small models of Fashion-MNIST on {', '.join(around['devices'])}; {around['images']:,} samples of {around['sampler_steps']} "
        "steps each. ± is one standard deviation, over seeds where there are several, else of sampling alone. Pruned rows are the best "
        "of up to three rankings, chosen after the fact. What stands in brackets was changed when the dynamic row had missed, chosen on "
        "the validation split, and where any model may profit from it, given to the best pruning as well. "
        f"{around['cells_done']} of {around['cells_all']} cells of the [protocol](docs/protocol.md) "
        "have run; "
        "[docs/results.md](docs/results.md) has all of them.",
    ]
    return "\n".join([*lines, *_claims(results["verdicts"])])


def _claims(verdicts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What was claimed beforehand, and what became of it in each family, with the ratio of the distances."""
    claims = dict.fromkeys(
        each["statement"] for found in verdicts.values() for each in found if each["outcome"] != NOT_MEASURED
    )
    if not claims:
        return []
    outcomes = {
        (family, each["statement"]): each["outcome"]
        + (f": {each['ratio'][0]:.2f}" if each["ratio"] is not None else "")
        for family, found in verdicts.items()
        for each in found
    }
    lines = [
        "",
        f"| claimed beforehand | {' | '.join(FAMILIES[family] for family in verdicts)} |",
        "| --- |" + " --- |" * len(verdicts),
    ]
    return lines + [
        f"| {claim} | {' | '.join(outcomes.get((family, claim), '') for family in verdicts)} |"
        for claim in claims
    ]


def chosen(results: Mapping[str, Any], family: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a family that the README shows: dynamic ones, each with the best pruning of its ratio behind it, and remedied ones.

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
        and row["arm"] in ("dynamic", PRUNED_TWIN)
        and row["variant"].startswith(REMEDIED)
        and row["state"] != NOT_MEASURED
    ]
    yield from (row for row in rows if row["arm"] == ALONE[0])
    for row in sorted((row for row in rows if row["arm"] == "dynamic"), key=lambda row: -row["lambda"]):
        treated = [each for each in remedied if each["lambda"] == row["lambda"]]
        yield row
        yield from (each for each in treated if each["arm"] == row["arm"])
        pruned = [
            each
            for each in rows
            if each["arm"].startswith("pruned-")
            and each["lambda"] == row["lambda"]
            and each["state"] != NOT_MEASURED
        ]
        yield from sorted(pruned, key=lambda each: each["fd"])[:1]
        yield from (each for each in treated if each["arm"] != row["arm"])
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
