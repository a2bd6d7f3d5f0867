"""How the reason of a process's failure reaches the one that started it: a file in the form of torch's launcher, with our three parts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dydit_cli.processes.environment import ERROR_FILE, rank_in

LOST = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "nccl")
"""Words of torch's errors about another process that is gone."""


@dataclass(frozen=True)
class WorkerFailure:
    """Why a process ended.

    Attributes:
        rank: Its number.
        what, why, fix: For the user.
        exit_code: Of the process.
        second_hand: Whether it only noticed that another one was gone.
    """

    rank: int
    what: str
    why: str
    fix: str
    exit_code: int
    second_hand: bool = False


def record_failure(what: str, why: str, fix: str, exit_code: int, error: Exception) -> WorkerFailure:
    """Leave word of this process's failure for its launcher, if it has one that listens."""
    failure = WorkerFailure(rank_in(), what, why, fix, exit_code, second_hand=_is_second_hand(error))
    path = os.environ.get(ERROR_FILE)
    if path:
        content = {
            "message": {"message": f"{what} {why}", "extraInfo": {"timestamp": str(int(time.time()))}},
            "dydit": asdict(failure),
        }
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    return failure


def read_failure(content: Mapping[str, Any]) -> WorkerFailure | None:
    """What `record_failure` left, as torch's launcher read it; None if the process left no word."""
    found = content.get("dydit")
    return WorkerFailure(**found) if isinstance(found, dict) else None


def _is_second_hand(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in LOST)
