"""Nothing half-written: every file and folder is made under a temporary name and renamed when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
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
        if f"os error {code}" in message or os.strerror(code).lower() in message.lower():
            return code
    # torch's zip writer reports a short write without saying which error caused it.
    return errno.ENOSPC if "PytorchStreamWriter failed" in message else None


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
        temporary.rename(out)
        return
    old = temporary_folder(out, OLD) / KEPT
    try:
        out.rename(old)
        temporary.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        # Refuses where anything is left in it, so that nothing is lost if the way back fails too.
        old.parent.rmdir()
        raise
    shutil.rmtree(old.parent, ignore_errors=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary file name beside ``path`` that is renamed to it when the block ends well."""
    path = Path(path)
    temporary = temporary_file(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Have the system put the files of a folder on the disk, so that a power cut does not leave a name with half a content."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or (path.is_dir() and os.name == "posix"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, indented, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
