"""What a killed process leaves behind: temporary names that say whose they are, and their removal once nobody owns them.

A process that is killed outright cannot clean up. Its half-written files therefore carry its name: machine, process number and the
moment when it started, which tells it from a later process of the same number. Only what belongs to a process of this machine
that is gone is ever removed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

PART, OLD = ".part", ".old"
"""Endings of what is being written, and of what it is about to replace."""

KEPT = "old"
"""Name, within a folder that ends in `OLD`, of what is being replaced."""

_NAME = re.compile(
    r"\.(?P<target>.+)\.(?P<owner>[0-9a-f]{8}-\d+-[0-9a-f]+)(-\w+)?(?P<ending>\.part|\.old)", re.ASCII
)


def temporary_folder(target: Path, ending: str = PART) -> Path:
    """Make an empty folder beside ``target`` that is known to be this process's."""
    return Path(
        tempfile.mkdtemp(prefix=f".{target.name}.{process_name()}-", suffix=ending, dir=target.parent)
    )


def temporary_file(target: Path) -> Path:
    """A name beside ``target`` that is known to be this process's."""
    return target.with_name(f".{target.name}.{process_name()}{PART}")


def remove_folder(path: Path) -> None:
    """Remove a folder so that whoever looks sees all of it or nothing, also when the process is killed meanwhile."""
    grave = temporary_folder(path)
    path.rename(grave / KEPT)
    shutil.rmtree(grave, ignore_errors=True)


def clear_leftovers(folder: Path, target: str | None = None) -> list[Path]:
    """Remove what killed processes left half-written in ``folder``, and put back what they were about to replace.

    Args:
        folder: Where to look, not below it.
        target: Of what name alone; of any if not given.

    Returns:
        What was removed or put back; empty where there was nothing.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    found = []
    for path in entries:
        match = _NAME.fullmatch(path.name)
        if match is None or target not in (None, match["target"]) or may_run(match["owner"]):
            continue
        place = path.with_name(match["target"])
        if match["ending"] == OLD and (path / KEPT).exists() and not place.exists():
            # It was killed between the two renames: neither the old nor the new stood at its place.
            (path / KEPT).rename(place)
            found.append(place)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        found.append(path)
    return found


def process_name(pid: int | None = None) -> str:
    """A name that no other process has: machine, number and start of a process of this machine; this one by default."""
    number = os.getpid() if pid is None else pid
    return f"{_machine()}-{number}-{_started(number):x}"


def may_run(name: str) -> bool:
    """Whether the process of that name may still be there; true for what cannot be known from here."""
    machine, pid, started = name.split("-")
    if machine != _machine() or os.name != "posix":
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _started(int(pid)) == int(started, 16)


def _started(pid: int) -> int:
    """When a process started, in the kernel's ticks; 0 where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The second field is the command in brackets, which may hold anything.
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _machine() -> str:
    """The machine, and the container on it, within which process numbers mean something."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    return hashlib.blake2b(f"{platform.node()} {container}".encode(), digest_size=4).hexdigest()
