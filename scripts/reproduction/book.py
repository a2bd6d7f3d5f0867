"""What has run, what is asked for, and which remedies the results call for."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import write_json
from scripts.reproduction.cells import CONTROL, Cell
from scripts.reproduction.remedies import (
    HYPOTHESES,
    LEAST_REMEDIES,
    REMEDIES,
    SUBJECTS,
    Subject,
    all_remedies,
    called_for,
    cells_for,
    remedied_cells,
    remedies_for,
    subjects_named,
    validation_cell,
    winner,
)
from scripts.reproduction.remedy_report import OPEN, outcome_of
from scripts.reproduction.report import results_of
from scripts.reproduction.running import REPOSITORY, RESULT, Runner, Say
from scripts.reproduction.working import done, is_done

REFERENCE_IMAGES = 60_000
TIMING = "timing.json"
SETTLED = "settled.json"
"""Row -> the remedy that was chosen for the test reference, once; None where none had won."""


class Book:
    """Which cells there are, which are asked for, and what came of them.

    Args:
        runner: Knows what has run.
        cells: Of the protocol, the remedies left out.
        options: What was asked for.
    """

    def __init__(self, runner: Runner, cells: Sequence[Cell], options: argparse.Namespace) -> None:
        self.runner, self.cells, self._options = runner, list(cells), options
        if options.remedies and (strange := set(self._names()) - set(HYPOTHESES)):
            raise SystemExit(
                f"error: --remedies knows {', '.join(HYPOTHESES)}, not {', '.join(sorted(strange))}"
            )

    def wanted(self) -> list[Cell]:
        """The cells that are asked for, in their order; remedies are those that the results of now call for."""
        groups = self._options.group
        remedies = self.remedies() if groups is None or "remedy" in groups else []
        # Without --group, rates that nothing depends on are not chosen.
        asked = groups or ("core", "extended", *(("choice",) if self.runner.chooses else ()))
        planned = [cell for cell in self.cells if cell.group in asked]
        # What the protocol demands of a miss comes before what completes the tables.
        first = [cell for cell in planned if cell.group != "extended"]
        last = [cell for cell in planned if cell.group == "extended"]
        return [cell for cell in (*first, *remedies, *last) if self._named(cell)]

    def remedies(self) -> list[Cell]:
        """Cells of the remedies that are called for, and of those that won."""
        if self._options.remedies:
            subjects = subjects_named(self._names())
        else:
            subjects = self.called_for()
        tried = [cell for subject in subjects for cell in cells_for(subject)]
        return list(dict.fromkeys([*tried, *self.remedied()]))

    def called_for(self) -> list[Subject]:
        """The rows whose hypotheses were missed or left undecided; none in a quick run, whose verdicts mean nothing."""
        if self._options.quick:
            return []
        unfinished = {
            cell.row for cell in self.cells if cell.group == "core" and not is_done(self.runner, cell)
        }
        return called_for(self.results()["verdicts"], unfinished)

    def remedied(self) -> list[Cell]:
        """Remedies that won on the validation split and were settled, against the test reference."""
        by_name = {remedy.name: remedy for remedy in REMEDIES}
        found = [
            cell
            for subject in SUBJECTS
            if (name := self.settled().get(row_name(subject))) is not None
            for cell in remedied_cells(subject, by_name[name])
        ]
        # Rows that settled on the same remedy share the control that has it.
        return list(dict.fromkeys(found))

    def settled(self) -> dict[str, str | None]:
        """By row, the remedy that was chosen for the test reference; nothing of rows that may still be given others."""
        file = self.runner.out / SETTLED
        return _read_json(file) if file.exists() else {}

    def settle(self, say: Say) -> None:
        """Choose the best remedy of each row that enough were tried for. What was chosen once stays: the reference is asked once."""
        found, held = self._of_remedies(), self.settled()
        for subject in SUBJECTS:
            tried = [remedy for remedy in remedies_for(subject) if validation_cell(subject, remedy) in found]
            name = row_name(subject)
            if name in held or not tried:
                continue
            if len(tried) < LEAST_REMEDIES:
                say(f"{name}: {len(tried)} remedies have run, {LEAST_REMEDIES} are the least; not settled")
                continue
            won = winner(subject, found)
            held[name] = None if won is None else won.name
            say(
                f"{name}: {'no remedy has won' if won is None else won.title + ' has won'} on the validation split"
            )
        write_json(self.runner.out / SETTLED, held)

    def results(self) -> dict[str, Any]:
        """What has run, for the report."""
        runner, sizes = self.runner, self.runner.around.sizes
        found: list[dict[str, Any]] = []
        choices: dict[str, Any] = {}
        remedied = self.remedied()
        for cell in (*self.cells, *all_remedies(), *remedied):
            planned = done(runner, cell)
            if planned is None or planned.result is None:
                continue
            timing = planned.folder / TIMING
            held = dict(planned.result)
            if timing.exists():
                held["timing"] = _read_json(timing)
            found.append(held)
            if (
                runner.chooses
                and cell.group == "choice"
                and (chosen := runner.chosen(cell.family, cell.kind))
            ):
                distances = {str(rate): value for rate, value in chosen[1].items()}
                choices[f"{cell.family} {cell.kind}"] = {"rate": chosen[0], "distances": distances}
        add_times(found)
        rows = dict(Counter(cell.row for cell in (*self.cells, *remedied) if not cell.is_validated))
        # Choices that nothing depends on are not asked for.
        planned_names = {cell.name for cell in self.cells if runner.chooses or cell.group != "choice"}
        circumstances = {
            "quick": self._options.quick,
            "images": sizes.images,
            "sampler_steps": sizes.sampler_steps,
            "reference_images": REFERENCE_IMAGES,
            "hashes": dict(runner.around.hashes),
            "bases": dict(runner.around.bases),
            "learning_rates": "chosen on the validation split"
            if runner.chooses
            else "the recipes' own, not chosen",
            "devices": dict(Counter(cell["device"] for cell in found)),
            "versions": list(dict.fromkeys(_versions(cell["versions"]) for cell in found)),
            "cells_done": sum(cell["name"] in planned_names for cell in found),
            "cells_all": len(planned_names),
            "codes": dict(Counter(code for cell in found for code in cell.get("code", []))),
        }
        return results_of(found, rows, circumstances, choices)

    def strangers(self) -> list[str]:
        """Finished cells of the folder that are none of these: of other settings, bases, data or another version."""
        known = (*self.cells, *all_remedies(), *self.remedied())
        mine = {planned.folder.name for cell in known if (planned := done(self.runner, cell)) is not None}
        finished = {file.parent.name for file in self.runner.out.glob(f"cells/*/{RESULT}")}
        return sorted(finished - mine)

    def published(self) -> dict[str, Any]:
        """`results` and what came of the remedies, without the names of this machine's folders."""
        around = self.runner.around
        places = {str(self.runner.out): "runs/reproduce", str(REPOSITORY): "."}
        if Path(around.data).is_absolute():
            places[around.data] = "FOLDER"
        places |= {base: Path(base).name for base in around.bases.values() if Path(base).is_absolute()}
        found: dict[str, Any] = without_places(self._with_remedies(), places)
        return found

    def _with_remedies(self) -> dict[str, Any]:
        results = self.results()
        found, settled = self._of_remedies(), self.settled()
        called = self.called_for()
        results["remedies"] = [
            outcome_of(subject, found, results, settled.get(row_name(subject), OPEN))
            for subject in SUBJECTS
            if subject in called or any(cell in found for cell in cells_for(subject)[2:])
        ]
        return results

    def _of_remedies(self) -> dict[Cell, dict[str, Any]]:
        planned = {cell: done(self.runner, cell) for cell in all_remedies()}
        return {cell: each.result for cell, each in planned.items() if each and each.result}

    def _names(self) -> list[str]:
        return [name.strip() for name in (self._options.remedies or "").split(",") if name.strip()]

    def _named(self, cell: Cell) -> bool:
        return not self._options.only or any(fnmatch(cell.name, pattern) for pattern in self._options.only)


def _versions(found: Mapping[str, str]) -> str:
    """Those that results depend on, in words."""
    return ", ".join(f"{name} {found[name]}" for name in ("torch", "diffusers") if name in found)


def row_name(subject: Subject) -> str:
    """What a row is called in the file of remedies that were settled."""
    return f"{subject.family}-{subject.arm}-{subject.ratio:g}"


def without_places(value: Any, places: Mapping[str, str]) -> Any:
    """Replace folders in all strings of nested lists and dictionaries, the longest first."""
    if isinstance(value, str):
        for place in sorted(places, key=len, reverse=True):
            value = value.replace(place, places[place])
        return value
    if isinstance(value, dict):
        return {key: without_places(each, places) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(each, places) for each in value]
    return value


def add_times(cells: Sequence[dict[str, Any]]) -> None:
    """Give each timed cell its ratio to the control's time, and that times the control's seconds.

    Rows are timed one after the other, and what else the machine does moves their seconds; their ratios were paired.
    """
    controls = {
        cell["family"]: cell["timing"]["seconds_per_image"]
        for cell in cells
        if cell["arm"] == CONTROL and "timing" in cell
    }
    for cell in cells:
        if "timing" in cell and cell["family"] in controls:
            ratio = 1.0 if cell["arm"] == CONTROL else cell["timing"]["time_ratio"]
            cell |= {"time_ratio": ratio, "seconds_per_image": ratio * controls[cell["family"]]}


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
