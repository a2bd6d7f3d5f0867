"""Commands that run in several processes: starting them, and who of them speaks.

The user's process only starts the others, each of which runs the same command. Of these the first prints; what made one fail is
said once, by the process that started them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from dydit_cli.cli import console
from dydit_cli.processes.environment import die_with_launcher, has_our_launcher, is_launched, rank_in

if TYPE_CHECKING:
    from dydit_cli.cli.failures import Failure

INTERRUPTED = 130
FIRST_SPEAKS_SECONDS = 10.0
"""Under torchrun, which stops the others when the first has failed: what all of them found wrong is then said once."""


def run_in_processes(context: typer.Context, processes: int) -> None:
    """Start the command anew in ``processes`` processes and leave with their exit code; return at once where one is enough, or
    where this is one of them.

    Raises:
        typer.Exit: When they have ended.
    """
    if processes == 1 or is_launched():
        return
    from dydit_cli.processes.launching import launch

    outcome = launch(context.find_root().obj, processes)
    if outcome.failure is not None:
        console.explain(outcome.failure.what, outcome.failure.why, outcome.failure.fix)
    if outcome.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
    raise typer.Exit(outcome.exit_code)


@contextmanager
def worker() -> Iterator[None]:
    """What is different in a process that a launcher started: it ends with the launcher, and only the first speaks."""
    if not is_launched():
        yield
        return
    die_with_launcher()
    if rank_in() == 0:
        yield
        return
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w") as silence:
        sys.stdout = sys.stderr = silence
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams


def part() -> None:
    """Part from the other processes after a command that they ran together."""
    if is_launched() and "torch" in sys.modules:
        from dydit_cli.processes.world import leave

        leave()


def is_spoken_for() -> bool:
    """Whether the process that started this one says how the command ended."""
    return has_our_launcher()


def told(failure: Failure, error: Exception) -> bool:
    """Leave word of a failure for the process that started this one; return whether that one will say it."""
    if not is_launched():
        return False
    from dydit_cli.processes.failures import record_failure

    record_failure(failure.what, failure.why, failure.fix, failure.exit_code, error)
    if has_our_launcher():
        return True
    if rank_in() > 0:
        time.sleep(FIRST_SPEAKS_SECONDS)
        sys.stderr = sys.__stderr__
    return False
