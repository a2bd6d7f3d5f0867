"""`dydit bench --latency-table` and `--check-table`: times for a run whose target is time, and whether they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dydit_cli.cli import console
from dydit_cli.cli.progress import progress_bar
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    import torch

    from dydit_cli.benchmarking.settings import BenchSettings
    from dydit_cli.dynamic.latency import LatencyTable

NEAR = 0.01
"""A prediction further off than this is warned of."""


def measure(
    settings: BenchSettings, device: torch.device, file: Path, overwrite: bool, as_json: bool
) -> None:
    """Measure a table and write it."""
    from dydit_cli.artifacts import write_json
    from dydit_cli.artifacts.writing import refuse_existing
    from dydit_cli.benchmarking.contest import threads_of
    from dydit_cli.benchmarking.latency_table import measure_table
    from dydit_cli.benchmarking.settings import CLOCKS
    from dydit_cli.benchmarking.subjects import open_subject

    refuse_existing(file, overwrite)
    with threads_of(settings.threads), progress_bar() as progress:
        task = progress.add_task("measuring the table", total=settings.pairs)
        subject = open_subject(settings, device)
        table = measure_table(
            subject.model,
            subject.inputs(max(settings.batch))[0],
            rounds=settings.pairs,
            clock=CLOCKS[settings.clock_name(device)],
            seed=settings.seed,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    write_json(file, table.as_json())
    if as_json:
        console.emit_json(table.as_json())
        return
    _show(table)
    console.say(f"Written to {file}.")
    console.note(f"next: dydit finetune RECIPE target=latency latency_table={quoted(file)}")


def check(settings: BenchSettings, device: torch.device, file: Path, as_json: bool) -> None:
    """Compare a table's prediction for a model with its measured time."""
    from dydit_cli.benchmarking.contest import threads_of
    from dydit_cli.benchmarking.latency_table import check_table
    from dydit_cli.benchmarking.settings import CLOCKS
    from dydit_cli.benchmarking.subjects import open_subject
    from dydit_cli.dynamic.latency import read_table

    table = read_table(file)
    with threads_of(settings.threads), progress_bar() as progress:
        task = progress.add_task("measuring", total=settings.pairs)
        subject = open_subject(settings, device)
        found = check_table(
            subject.model,
            table,
            subject.inputs(int(table.measured.get("batch", max(settings.batch)))),
            rounds=settings.pairs,
            clock=CLOCKS[settings.clock_name(device)],
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        console.emit_json(found.as_json())
        return
    console.say(
        f"time of compact / static execution: {found.predicted:.4f} by the table, {found.measured:.4f} measured "
        f"({found.rounds} pairs, batch {table.measured.get('batch')})"
    )
    off = abs(found.predicted - found.measured)
    if off > NEAR:
        console.warn(
            f"the table is off by {off:.3f}: measure it anew on this machine while it is calm, with the batch that will be sampled."
        )


def _show(table: LatencyTable) -> None:
    from rich.table import Table

    shown = Table(
        box=None, padding=(0, 2, 0, 0), title="time relative to the static model", title_justify="left"
    )
    shown.add_column("")
    for share in table.tokens:
        shown.add_column(f"{share:.0%} of tokens", justify="right")
    for count, row in zip(table.groups, table.mlp, strict=True):
        shown.add_row(f"{count} groups", *(f"{value:.3f}" for value in row))
    for count, value in zip(table.heads, table.attention, strict=True):
        shown.add_row(f"{count} heads, the rest on", *[""] * (len(table.tokens) - 1), f"{value:.3f}")
    console.results().print(shown)
