"""What a launcher says to the processes that it starts: the environment variables of torch's `env://` contract, and ours."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torch's launcher looks for the reason of a process that failed."""

LAUNCHER = "DYDIT_LAUNCHER"
"""Set for processes that `launch` started; the one that started them says what went wrong."""


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher (ours, torchrun, or another that fulfils the contract) started this process."""
    return RANK in environment and WORLD_SIZE in environment


def rank_in(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process among all; 0 where there is one."""
    return int(environment[RANK]) if is_launched(environment) else 0


def has_our_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `launch` started this process."""
    return is_launched(environment) and LAUNCHER in environment


def die_with_launcher() -> None:
    """Have the system stop this process politely when the one that started it is gone, be it by kill -9 (Linux only)."""
    if has_our_launcher() and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
