"""Nothing half-written: every file and folder is made under a temporary name and renamed when it is whole."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dydit_cli.artifacts.leftovers import (
    KEPT,
    OLD,
    clear_leftovers,
    temporary_file,
    temporary_folder,
)
from dydit_cli.errors import DyditError

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file-size limit was reached",
}

TORCH_SHORT_WRITE = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
"""How torch's zip writer, by version and size, reports a short write; it does not say which error caused it (docs/upstream.md)."""

WAITS_SECONDS = (0.0, 0.1, 0.3, 1.0, 2.0)
"""Before a rename that Windows refused is tried again."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while ``path`` is written into a `DyditError`."""
    try:
        yield
    except OSError as error:
        raise _explained(path, error) from error
    except Exception as error:
        # safetensors and torch wrap the system's error in types of their own and keep only its text.
        code = _code_in(str(error))
        if code is None:
            raise
        raise _explained(path, OSError(code, os.strerror(code))) from error


def _code_in(message: str) -> int | None:
    for code in FULL:
        # Windows has no words for some of them, and says so.
        words = os.strerror(code).lower()
        if f"os error {code}" in message or (words in message.lower() and "unknown" not in words):
            return code
    return errno.ENOSPC if any(words in message for words in TORCH_SHORT_WRITE) else None


def _explained(path: Path, error: OSError) -> DyditError:
    reason = FULL.get(error.errno or 0)
    if reason:
        free = _free_bytes(path)
        return DyditError(
            f"{path} could not be written: {reason}.",
            why=f"The system reported '{error.strerror}'"
            + (f"; {free / 1e9:.2f} GB are free there." if free is not None else "."),
            fix="Free space or choose another --out; what was there before is untouched.",
        )
    return DyditError(
        f"{path} could not be written.",
        why=f"The system reported '{error.strerror or error}'{f' for {error.filename}' if error.filename else ''}.",
        fix="Check that the parent folder exists and is writable, or choose another --out.",
    )


def _free_bytes(path: Path) -> int | None:
    for folder in (path, *path.parents):
        if folder.exists():
            return shutil.disk_usage(folder).free
    return None


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise unless ``out`` is free: absent, an empty folder, or to be replaced.

    Raises:
        DyditError: If something is there.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not overwrite:
        raise DyditError(
            f"{out} exists already.",
            why="Replacing results silently would lose them.",
            fix="Choose another --out, or pass --overwrite to replace it.",
        )


@contextmanager
def artifact_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    What earlier processes that were killed left of the same ``out`` is cleared first.

    Raises:
        DyditError: If ``out`` exists and ``overwrite`` is off, if it is where the process runs, or if the disk refuses.
    """
    clear_leftovers(Path(out).parent, Path(out).name)
    refuse_existing(Path(out), overwrite)
    # Absolute, because a relative path leads elsewhere once a folder on its way has been renamed.
    out = Path(os.path.abspath(out))
    if Path.cwd().is_relative_to(out.resolve()):
        raise DyditError(
            f"{out} is the folder that dydit runs in.",
            why="An artifact takes the place of the whole folder, which would vanish under the running command.",
            fix="Choose another --out, or run dydit from another folder.",
        )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_folder(out)
        # mkdtemp makes a private folder; an artifact is as readable as any other folder.
        temporary.chmod(0o777 & ~_umask())
    try:
        with writing(out):
            yield temporary
            _make_readable(temporary)
            # Another run with the same --out may have ended meanwhile.
            refuse_existing(out, overwrite)
            _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Give files the usual permissions: safetensors makes its own private."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_umask())


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _replace(temporary: Path, out: Path) -> None:
    """Put ``temporary`` in the place of ``out``; an older folder goes only after the new one stands."""
    if not out.exists():
        patiently(lambda: temporary.rename(out))
        return
    old = temporary_folder(out, OLD) / KEPT
    try:
        patiently(lambda: out.rename(old))
        patiently(lambda: temporary.rename(out))
    except BaseException:
        if old.exists() and not out.exists():
            patiently(lambda: old.rename(out))
        # Refuses where anything is left in it, so that nothing is lost if the way back fails too.
        old.parent.rmdir()
        raise
    shutil.rmtree(old.parent, ignore_errors=True)


def patiently(rename: Callable[[], object], system: str = os.name) -> None:
    """Rename something; on Windows try again for a few seconds.

    There nothing can be renamed while a file of it is open, be it by a search index, a virus scanner, or weights of ours that are
    mapped into memory and wait for the garbage collector.

    Args:
        rename: Does it.
        system: As `os.name`.

    Raises:
        OSError: What the system says, on Windows the last time.
    """
    for wait in WAITS_SECONDS if system == "nt" else ():
        try:
            rename()
            return
        except PermissionError:
            gc.collect()
            time.sleep(wait)
    rename()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary file name beside ``path`` that is renamed to it when the block ends well."""
    path = Path(path)
    temporary = temporary_file(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            patiently(lambda: os.replace(temporary, path))
    finally:
        temporary.unlink(missing_ok=True)


def flush(folder: Path, system: str = os.name) -> None:
    """Have the system put the files of a folder on the disk, so that a power cut does not leave a name with half a content.

    Args:
        folder: With the files, and folders in it.
        system: As `os.name`.
    """
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or (path.is_dir() and system == "posix"):
            # Windows flushes through a handle that may write alone.
            descriptor = os.open(path, os.O_RDONLY if system == "posix" else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, indented, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
