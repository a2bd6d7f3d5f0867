"""Start as many processes of the same command as a run asks for, with torch's own launcher, and say in one voice what went wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from dydit_cli.processes.environment import LAUNCHER
from dydit_cli.processes.failures import WorkerFailure, read_failure

GRACE_SECONDS = 600
"""For a checkpoint after a polite stop, before a process is killed."""

STOPPED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}
"""Exit codes of processes that were asked to stop because another one had failed."""


@dataclass(frozen=True)
class Outcome:
    """How a run in several processes ended.

    Attributes:
        exit_code: As of one process: 0, or that of the process that ended it.
        failure: What that process said, if it has not said it itself.
    """

    exit_code: int
    failure: WorkerFailure | None = None


def launch(words: Sequence[str], processes: int) -> Outcome:
    """Run `dydit WORDS` in ``processes`` processes of this machine and wait for them.

    The first speaks for all. When one fails, the others are stopped, and what it said is handed back. Ctrl-C and SIGTERM are
    passed on once, so that the run can write a checkpoint.

    Args:
        words: The command and its arguments.
        processes: How many.
    """
    with tempfile.TemporaryDirectory(prefix="dydit-") as logs, _environment(processes), _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid4().hex,
            # What `torchrun --standalone` does: a free port, found by the launcher itself.
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        before = {number: signal.getsignal(number) for number in _handled()}
        try:
            launch_agent(config, sys.executable, ["-m", "dydit_cli", *words])
        except ChildFailedError as error:
            return outcome_of(error.failures, processes)
        except SignalException as stopped:
            return Outcome(128 + int(stopped.sigval))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return Outcome(0)


def outcome_of(failures: Mapping[int, ProcessFailure], processes: int) -> Outcome:
    """The failure that came first, or an exit code that explains itself."""
    told = {rank: read_failure(failure.error_file_data) for rank, failure in failures.items()}
    silent = {rank: failure.exitcode for rank, failure in failures.items() if told[rank] is None}
    first_hand = [failure for failure in told.values() if failure is not None and not failure.second_hand]
    if first_hand:
        # What all of them found wrong is said as of one process.
        return _failed(min(first_hand, key=lambda failure: failure.rank), processes)
    for rank, code in silent.items():
        if code < 0 and code not in STOPPED:
            return _failed(_killed(rank, signal.Signals(-code), processes), processes)
    spoken = [code for code in silent.values() if code not in STOPPED]
    if spoken:
        return Outcome(spoken[0])
    second_hand = [failure for failure in told.values() if failure is not None]
    if second_hand:
        return _failed(second_hand[0], processes)
    return Outcome(128 + signal.SIGTERM)


def _failed(failure: WorkerFailure, processes: int) -> Outcome:
    if failure.rank > 0 and not failure.what.startswith("Process "):
        failure = replace(failure, what=f"Process {failure.rank} of {processes}: {failure.what}")
    return Outcome(failure.exit_code, failure)


def _killed(rank: int, by: signal.Signals, processes: int) -> WorkerFailure:
    return WorkerFailure(
        rank,
        f"Process {rank} of {processes} was killed ({by.name}), so the others were stopped.",
        "The system kills processes like that when memory runs out."
        if by.name == "SIGKILL"  # which Windows does not have
        else "A program ends like that on an error in compiled code, such as a driver's.",
        "Look for it in the system's log (dmesg); a training run goes on from its newest checkpoint with --resume.",
        exit_code=2,
    )


@contextmanager
def _environment(processes: int) -> Iterator[None]:
    """Variables that the processes inherit, put back afterwards; what the user set stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {
        LAUNCHER: str(os.getpid()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS),
        # Else every process takes all cores, and they starve each other.
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if sys.platform == "win32":
        # torch for Windows is built without the library that its meeting place asks for by default.
        wanted["USE_LIBUV"] = "0"
    # The launcher sets this one itself, and leaves it.
    names = [*wanted, "TORCHELASTIC_SIGNALS_TO_HANDLE", "PYTHONPATH"]
    before = {name: os.environ.get(name) for name in names}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ[LAUNCHER] = wanted[LAUNCHER]
    # The processes run this very code, installed or not.
    own = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        yield
    finally:
        for name, earlier in before.items():
            if earlier is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = earlier


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the launcher's own account of failures, which is a page of its internals; its loggers have levels of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _handled() -> list[int]:
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
