"""`dydit compare`: quality, multiply-accumulates, time and parameters of several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, options

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = (
    "dydit compare runs/e-static runs/e-dynamic",
    "dydit compare runs/* --format markdown",
    "dydit compare runs/e-static runs/e-dynamic --format latex > table.tex",
)

MOST_BESIDE = 5
"""Runs that stand side by side; more stand one below the other."""


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN | FOLDER …",
            help="Folders that dydit evaluate or dydit profile wrote, or folders that hold such.",
            show_default=False,
        ),
    ],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            "--format",
            help="table, csv, markdown or latex.",
            autocompletion=completing.among("table", "csv", "markdown", "latex"),
        ),
    ] = "table",
    json: options.AsJson = False,
) -> None:
    """Print quality, multiply-accumulates, measured time and parameters of runs, with error bars.

    Errors are half of the 95 % interval. CSV has both ends of every interval, unrounded. A profile is joined to the
    evaluations of the same weights.
    """
    from dydit_cli.evaluation.gathering import gather
    from dydit_cli.evaluation.tables import TABLE, as_text, header, rows

    found = gather(runs)
    if json:
        from dataclasses import asdict

        console.emit_json(asdict(found))
    elif format == TABLE:
        console.results().print(_table(header(found.runs), rows(found.runs)))
        console.note(
            "± is half of the 95 % interval: other samples of the same number, the reference taken as fixed."
        )
    else:
        console.say(as_text(found.runs, format).rstrip("\n"))
    for text in found.warnings:
        console.warn(text)


def _table(titles: list[str], lines: list[list[str]]) -> Table:
    """A run a row; few runs stand side by side instead, because a terminal is higher than it is wide."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    if len(lines) > MOST_BESIDE:
        for position, title in enumerate(titles):
            table.add_column(
                title, header_style="dim", justify="left" if position < 2 else "right", no_wrap=True
            )
        for line in lines:
            table.add_row(*line)
        return table
    table.add_column("", style="dim")
    for line in lines:
        table.add_column(line[0], header_style="bold", justify="right", overflow="fold")
    for title, *cells in list(zip(titles, *lines, strict=True))[1:]:
        table.add_row(title, *cells)
    return table
