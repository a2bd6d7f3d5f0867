"""`dydit doctor`: whether this machine and this Python are fit for dydit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from dydit_cli import __version__
from dydit_cli.cli import console, options

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.diagnosis.check import Check

EXAMPLES = ("dydit doctor", "dydit doctor --json")

BROKEN = 2
STYLES = {"good": "green", "note": "dim", "warning": "yellow", "broken": "bold red"}
SIGNS = {"good": "ok", "note": "-", "warning": "warning", "broken": "broken"}


def doctor(
    json: options.AsJson = False,
) -> None:
    """Examine this machine: versions, devices, optional parts, threads, folders.

    Each line has a verdict, and a fix where there is something to mend. The exit code is 0 unless something that dydit needs is
    missing or broken.
    """
    from dydit_cli.diagnosis.check import Verdict, worst
    from dydit_cli.diagnosis.examine import examine

    if not json:
        console.note("importing torch and the libraries above it ...")
    checks = list(examine(__version__))
    verdict = worst(checks)
    if json:
        console.emit_json({"verdict": str(verdict), "checks": [check.as_json() for check in checks]})
    else:
        console.results().print(table(checks))
        for line in fixes(checks):
            console.say(line)
        console.say(summary(checks), style="bold")
    if verdict is Verdict.BROKEN:
        raise typer.Exit(BROKEN)


def table(checks: Sequence[Check]) -> Table:
    """A line a check, under the headings of their areas."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    area = ""
    for check in checks:
        if check.area != area:
            area = check.area
            drawn.add_row(Text(area, style="bold"), "", "")
        sign = Text(SIGNS[check.verdict], style=STYLES[check.verdict])
        drawn.add_row(f"  {check.name}", sign, check.found)
    return drawn


def fixes(checks: Sequence[Check]) -> list[str]:
    """What mends what is broken or slow; optional parts that are missing say it in --json alone."""
    wrong = [check for check in checks if check.verdict in ("warning", "broken")]
    return ["", *(f"{check.name}: {check.fix}" for check in wrong), ""] if wrong else [""]


def summary(checks: Sequence[Check]) -> str:
    """One line."""
    counted = {name: sum(check.verdict == name for check in checks) for name in ("broken", "warning", "note")}
    if counted["broken"]:
        return f"{counted['broken']} of {len(checks)} checks found something broken that dydit needs."
    if counted["warning"]:
        return f"dydit works here; {counted['warning']} of {len(checks)} checks found something to mend."
    return (
        f"All is well: {len(checks)} checks, {counted['note']} of them notes on what only some commands use."
    )
