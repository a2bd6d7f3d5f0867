"""What was tried for a row, and what it did: for the results, and as a table of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.reproduction.cells import DYNAMIC, FAMILIES, PRUNED, Cell
from scripts.reproduction.remedies import (
    CAPACITY,
    PRUNED_TWIN,
    REMEDIED,
    REMEDIES,
    Remedy,
    Subject,
    partner,
    remedied_cells,
    remedies_for,
    validation_cell,
    winner,
)
from scripts.reproduction.verdicts import Row, RowKey, Spread, compare, student, table_of

OPEN = "open"
"""State of a row for which more remedies may be tried."""
NOT_MEASURED = "not measured"


def outcome_of(
    subject: Subject,
    found: Mapping[Cell, Mapping[str, Any]],
    results: Mapping[str, Any],
    settled: str | None,
) -> dict[str, Any]:
    """What came of the remedies of a row, for ``results.json``.

    Args:
        subject: The row.
        found: Results of the validation cells of remedies that have run.
        results: Of the test reference: cells and spread over seeds.
        settled: Name of the remedy that was chosen for the test reference, None if none won, `OPEN` while more may be tried.
    """
    own = found.get(validation_cell(subject))
    spread = _spread(results)
    best = winner(subject, found)
    return {
        "hypotheses": list(subject.hypotheses),
        "family": subject.family,
        "arm": subject.arm,
        "lambda": subject.ratio,
        "against": {"arm": subject.against[0], "lambda": subject.against[1]},
        "as_it_is": None if own is None else _measured(own, own, _rival(subject, None, found)),
        # Two cells of one seed each differ by chance, in 95 of 100 cases, by less than this share.
        "noise": None if spread is None else student(spread.freedom) * math.sqrt(2) * spread.relative,
        "tried": [_tried(subject, remedy, found, own) for remedy in remedies_for(subject)],
        "not_tried": [CAPACITY],
        "best": None if best is None else best.name,
        "settled": settled,
        "test": _on_test(subject, settled, results),
    }


def _tried(
    subject: Subject,
    remedy: Remedy,
    found: Mapping[Cell, Mapping[str, Any]],
    own: Mapping[str, Any] | None,
) -> dict[str, Any]:
    named = {"remedy": remedy.name, "title": remedy.title}
    result = found.get(validation_cell(subject, remedy))
    if result is None or own is None:
        return {**named, "state": NOT_MEASURED}
    return {
        **named,
        "state": "measured",
        **_measured(result, own, _rival(subject, remedy, found)),
    }


def _rival(
    subject: Subject, remedy: Remedy | None, found: Mapping[Cell, Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """What the row is compared with: where that was to be treated alike, with or without, whichever is better for it."""
    cells = {partner(subject), partner(subject, remedy)}
    return min((found[cell] for cell in cells), key=_distance) if cells <= found.keys() else None


def _distance(result: Mapping[str, Any]) -> float:
    return float(result["fd"])


def _measured(
    result: Mapping[str, Any], own: Mapping[str, Any], twin: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "fd": result["fd"],
        "difference": result["fd"] - own["fd"],
        "relative_difference": result["fd"] / own["fd"] - 1,
        "over_partner": None if twin is None else result["fd"] / twin["fd"],
        "held_out_loss": result["held_out_loss"],
        "ratio": result["ratio"],
        "gmacs": result["gmacs"],
        "steps": result["steps"],
        "commands": result["commands"],
    }


def _on_test(subject: Subject, settled: str | None, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The remedy that won, against the test reference: beside the row that missed, and over what that was compared with."""
    remedy = next((each for each in REMEDIES if each.name == settled), None)
    if remedy is None:
        return None
    rows: dict[tuple[str, str, float, str], list[Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        if cell["group"] not in ("choice", "remedy"):
            rows.setdefault((cell["family"], cell["arm"], cell["lambda"], cell["variant"]), []).append(cell)
    table = table_of(rows)
    row = table.get(remedied_cells(subject, remedy)[0].row)
    variants = ("", f"{REMEDIED}-{remedy.name}") if remedy.shared else ("",)
    rivals = [table.get((subject.family, *subject.against, variant)) for variant in variants]
    measured = [rival for rival in rivals if rival is not None]
    if row is None or len(measured) < len(rivals):
        return {"state": NOT_MEASURED}
    ratio = compare(row, min(measured, key=lambda rival: rival.fd), _spread(results))
    if ratio is None:
        return {"state": NOT_MEASURED}
    before = table.get(subject.row)
    return {
        "state": "measured",
        "fd": row.fd,
        "fd_of_the_row": None if before is None else before.fd,
        "over_partner": (ratio.ratio, ratio.low, ratio.high),
        "pruned_over_it": _pruned_over(subject, remedy, table, _spread(results)),
    }


def _pruned_over(
    subject: Subject, remedy: Remedy, table: Mapping[RowKey, Row], spread: Spread | None
) -> dict[str, Any] | None:
    """The best static pruning at a dynamic row's MACs over the remedied row, as H2 compares them; with a shared remedy or without."""
    row, *twins = (table.get(cell.row) for cell in remedied_cells(subject, remedy))
    rows = {arm: table.get((subject.family, arm, subject.ratio, "")) for arm in PRUNED}
    if subject.arm != DYNAMIC or row is None or None in twins:
        return None
    pruned = {(arm, False): found for arm, found in rows.items() if found is not None}
    if remedy.shared:
        treated = table.get((subject.family, PRUNED_TWIN, subject.ratio, f"{REMEDIED}-{remedy.name}"))
        pruned |= {(PRUNED_TWIN, True): treated} if treated is not None else {}
    if not pruned:
        return None
    best = min(pruned, key=lambda each: pruned[each].fd)
    ratio = compare(pruned[best], row, spread)
    if ratio is None:
        return None
    return {
        "arm": best[0],
        "treated": best[1],
        "fd": pruned[best].fd,
        "ratio": (ratio.ratio, ratio.low, ratio.high),
    }


def remedy_lines(outcomes: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """The part of the page, from `outcome_of` alone.

    Args:
        outcomes: Of each row.
        titles: Of arms.
    """
    if not outcomes:
        return []
    lines = [
        "## What was tried, and what it did",
        "",
        "Each remedy is the row with one thing changed, a cell of its own with seed 100, measured on the **validation** split: its "
        "distances compare with each other, not with those above. What any arm would profit from (more steps, another learning rate, "
        "other weights of noise levels) is given to what the row is compared with as well, which counts with or without it, whichever is "
        "better for it. The held-out loss is that of denoising, for all of them.",
        "",
    ]
    for outcome in outcomes:
        lines += _table(outcome, titles)
    return lines


def _table(outcome: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    against = titles.get(outcome["against"]["arm"], outcome["against"]["arm"])
    lines = [
        f"### {FAMILIES[outcome['family']]}, "
        f"{titles.get(outcome['arm'], outcome['arm'])}, λ {outcome['lambda']:g} ({', '.join(outcome['hypotheses'])})",
        "",
        f"| | Fréchet ↓ | against the row | over {against} | held-out loss ↓ | ratio held out | MMACs | steps |",
        "| --- |" + " ---: |" * 7,
    ]
    own = outcome["as_it_is"]
    if own is None:
        lines.append(f"| as it is | {NOT_MEASURED} |" + " |" * 6)
    else:
        lines.append(_line("as it is", own, is_own=True))
    lines += [_line(each["title"], each) for each in outcome["tried"] if each["state"] != NOT_MEASURED]
    left = [each["title"] for each in outcome["tried"] if each["state"] == NOT_MEASURED]
    left += [f"{name}, which needs a GPU" for name in outcome["not_tried"]]
    return [*lines, "", _conclusion(outcome, titles), "", f"Not measured: {'; '.join(left)}.", ""]


def _spread(results: Mapping[str, Any]) -> Spread | None:
    found = results["spread_over_seeds"]
    return None if found is None else Spread(**found)


def _line(title: str, found: Mapping[str, Any], *, is_own: bool = False) -> str:
    change = "" if is_own else f"{found['difference']:+.3f} ({found['relative_difference']:+.1%})"
    over = "" if found["over_partner"] is None else f"{found['over_partner']:.3f}"
    values = [f"{found['fd']:.3f}", change, over, f"{found['held_out_loss']:.5f}", f"{found['ratio']:.4f}"]
    values += [f"{found['gmacs'] * 1e3:.2f}", f"{found['steps']:,}"]
    return f"| {title} | {' | '.join(values)} |"


def _conclusion(outcome: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    against = titles.get(outcome["against"]["arm"], outcome["against"]["arm"])
    parts = []
    if outcome["noise"] is not None:
        parts.append(
            f"One seed each: by the spread over seeds of the rows above, differences below {outcome['noise']:.1%} may be chance."
        )
    title = {each["remedy"]: each["title"] for each in outcome["tried"]}
    if all(each["state"] == NOT_MEASURED for each in outcome["tried"]):
        return " ".join([*parts, "No remedy has run yet."])
    parts.append(
        f"Least distance of those at the row's MACs: {title[outcome['best']]}."
        if outcome["best"] is not None
        else "None of those that ran is better than the row at its MACs."
    )
    test = outcome["test"]
    if outcome["settled"] == OPEN:
        parts.append("More may be tried; none was measured against the test reference.")
    elif test is not None and test["state"] != NOT_MEASURED:
        ratio, low, high = test["over_partner"]
        before = "" if test["fd_of_the_row"] is None else f" (the row: {test['fd_of_the_row']:.3f})"
        parts.append(
            f"Against the test reference, once: {title[outcome['settled']]} has {test['fd']:.3f}{before}, {ratio:.3f} of {against} "
            f"(95 %: {low:.3f} to {high:.3f}; one seed, given the spread of the others)."
        )
        if (pruned := test["pruned_over_it"]) is not None:
            ratio, low, high = pruned["ratio"]
            treated = "treated alike, " if pruned["treated"] else ""
            parts.append(
                f"The best static pruning at the same MACs ({titles.get(pruned['arm'], pruned['arm'])}, {treated}{pruned['fd']:.3f}) has "
                f"{ratio:.3f} times its distance ({low:.3f} to {high:.3f})."
            )
    elif test is not None:
        parts.append(f"{title[outcome['settled']]} has not been measured against the test reference yet.")
    return " ".join(parts)
