"""How `--dry-run` of a stage is shown: what would be read, written and needed, with nothing done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from dydit_cli.cli import console
from dydit_cli.shell import quoted

UNKNOWN = "not known before it runs"
NOTHING_DONE = "Nothing was done, and nothing was written."


@dataclass(frozen=True)
class Foresight:
    """What a stage would do.

    Attributes:
        reads: What it would read: (what, words).
        makes: What it would make of it: (what, words).
        out: Where it would write; None if nowhere.
        nbytes: How much, if that is known.
        exact: Whether it is that much, or that at most.
        memory: Bytes that it needs beside the libraries, if that is known.
        facts: For ``--json``, beside these.
        warnings: What looks odd.
    """

    reads: Sequence[tuple[str, str]]
    makes: Sequence[tuple[str, str]]
    out: Path | None
    nbytes: int | None
    exact: bool = True
    memory: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def show(seen: Foresight, context: typer.Context, recipe_yaml: str, *, as_json: bool) -> None:
    """Print it.

    Args:
        seen: What was found out.
        context: Of the command.
        recipe_yaml: Its settings with every default filled in.
        as_json: Whether as JSON.
    """
    from rich.table import Table

    from dydit_cli.cli.plan import size

    free = free_bytes(seen.out or Path())
    warnings = list(seen.warnings)
    if seen.nbytes is not None and seen.nbytes > free:
        warnings.append(
            f"{size(seen.nbytes)} would be written and {size(free)} are free there: choose another --out."
        )
    for warning in warnings:
        console.warn(warning)
    if as_json:
        console.emit_json(
            {
                "dry_run": True,
                "stage": context.info_name,
                **seen.facts,
                "writes": {"path": seen.out, "bytes": seen.nbytes, "exact": seen.exact, "free": free},
                "memory": seen.memory,
                "seconds": None,
                "recipe": recipe_yaml,
                "warnings": warnings,
            }
        )
        return
    most = "" if seen.exact else " at most"
    amount = (
        UNKNOWN
        if seen.nbytes is None
        else f"about {size(seen.nbytes)}{most}, and {size(free)} are free there"
    )
    rows = [
        *(
            ("reads" if place == 0 else "", f"{what}: {words}")
            for place, (what, words) in enumerate(seen.reads)
        ),
        *seen.makes,
        ("writes", "nothing" if seen.out is None else f"{seen.out}, {amount}"),
        ("memory", UNKNOWN if seen.memory is None else f"about {size(seen.memory)} beside the libraries"),
        ("time", UNKNOWN),
    ]
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    console.results().print(grid)
    console.note(NOTHING_DONE)
    console.note(f"next: {without_dry_run(context)}")


def without_dry_run(context: typer.Context) -> str:
    """The command that was given, without ``--dry-run``, ready to paste."""
    given: Sequence[str] = context.find_root().obj or ()
    return " ".join(["dydit", *(quoted(word) for word in given if word not in ("--dry-run", "--json"))])


def free_bytes(out: Path) -> int:
    """Bytes that are free where a folder would be made."""
    place = out.absolute()
    parent = next(folder for folder in (place, *place.parents) if folder.exists())
    return shutil.disk_usage(parent).free
