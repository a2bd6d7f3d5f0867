"""The progress bars of all commands: on stderr, gone when done, silent in a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dydit_cli.cli import console

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def progress_bar(*columns: str | ProgressColumn) -> Progress:
    """Return a progress display: what is done, a bar, how far, then ``columns``, and the time left.

    Args:
        columns: Further columns, as rich takes them.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    notes = console.notes()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
        # Results go to stdout as they are, also while a bar is shown on stderr.
        redirect_stdout=False,
    )
