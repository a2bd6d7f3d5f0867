"""See that what was written computes what the model computes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dydit_cli.errors import DyditError
from dydit_cli.export.programs.cases import Case

SCRIPT = Path(__file__).with_name("fresh.py")


def judged(differences: Sequence[float], scales: Sequence[float], tolerance: float, what: str) -> float:
    """The largest difference.

    Args:
        differences: Largest absolute one of each case.
        scales: Largest expected value of each.
        tolerance: Of these.
        what: The thing that was run, for the message.

    Raises:
        DyditError: If one is more than rounding.
    """
    for difference, scale in zip(differences, scales, strict=True):
        if not difference <= tolerance * max(scale, 1e-6):
            raise DyditError(
                f"{what} does not compute what the model computes: an output differs by {difference:.2g}.",
                why=f"It should agree to {tolerance:g} of the largest value, {scale:.2g}.",
                fix="Nothing was written; report this with the versions that `pip list` shows.",
            )
    return max(differences)


def difference_in_fresh_process(program: Path, cases: Sequence[Case], tolerance: float) -> float:
    """Load a program in a new process that has torch alone, and compare it.

    Raises:
        DyditError: If it cannot be loaded there, or differs by more than ``tolerance`` of the largest output.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls, result = Path(folder) / "cases.pt", Path(folder) / "result.json"
        torch.save([(case.inputs, case.expected) for case in cases], calls)
        # Not with -I, which hides a torch of `pip install --user` or PYTHONPATH; the script drops our folder from its path.
        command = [sys.executable, str(SCRIPT), str(program.resolve()), str(calls), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not result.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise DyditError(
                "The program cannot be run in a fresh process.",
                why=lines[-1] if lines else f"The process ended with {done.returncode} and said nothing.",
                fix="Nothing was written; report this with the versions that `pip list` shows.",
            )
        found = json.loads(result.read_text(encoding="utf-8"))
    return judged(found["differences"], found["scales"], tolerance, "The program")
