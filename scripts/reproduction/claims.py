"""Who runs what, where several processes share a folder of cells: a file a cell, made in one step, that says whose it is.

A claim holds the names of processes with their start (`artifacts.leftovers`), so that one whose processes are gone is recognised, also
where their numbers were given to others. The command that a cell runs is named as well: it may outlive the process that started it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import atomic_write
from dydit_cli.artifacts.leftovers import may_run, process_name


@dataclass(frozen=True)
class Claim:
    """What this process holds.

    Attributes:
        file: Where that is written.
        content: What is.
    """

    file: Path
    content: dict[str, Any]

    def includes(self, pid: int) -> None:
        """Say that a process which was started belongs to it."""
        content = {**self.content, "command": process_name(pid)}
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


class Claims:
    """The claims of a folder.

    Args:
        folder: Where they are; made at the first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def taken(self, name: str) -> Iterator[Claim | None]:
        """Hold a name as long as the block runs; None is given where another process holds it."""
        claim = self._take(name)
        try:
            yield claim
        finally:
            if claim is not None:
                claim.file.unlink(missing_ok=True)

    def held(self) -> list[str]:
        """Names that processes hold that may be running, this one among them."""
        return [
            file.stem
            for file in sorted(self._folder.glob("*.json"))
            if (content := _read(file)) is not None and _lives(content)
        ]

    def holds(self, name: str) -> bool:
        """Whether a process that may be running holds the name."""
        content = _read(self._file(name))
        return content is not None and _lives(content)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _take(self, name: str) -> Claim | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(name)
        content = {"process": process_name(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        for _ in range(2):
            if _created(file, content):
                return Claim(file, content)
            held = _read(file)
            if held is not None and _lives(held):
                return None
            if held is not None:
                _remove_stale(file, held)
        return None


def _created(file: Path, content: dict[str, Any]) -> bool:
    """Make a file with its content in one step; false if there is one."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
        # Unlike a rename, a link never replaces.
        os.link(draft, file)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _remove_stale(file: Path, held: dict[str, Any], rename: Callable[[Path, Path], None] = os.rename) -> None:
    """Take a dead claim away; what another process put in its place meanwhile is put back."""
    aside = file.with_name(f".{file.name}.{process_name()}.stale")
    try:
        rename(file, aside)
    except FileNotFoundError:
        return
    if _read(aside) != held:
        os.link(aside, file)
    aside.unlink()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def _lives(content: dict[str, Any]) -> bool:
    return any(may_run(content[name]) for name in ("process", "command") if name in content)
