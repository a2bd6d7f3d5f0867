"""What any failure of a command looks like to the user: three parts and an exit code, never a traceback.

Exit codes: 2 for what a user or a machine can mend (a wrong argument, a full disk, no memory), 1 for a bug of ours,
130 and 143 for being stopped.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dydit_cli.cli.stage import STAGES
from dydit_cli.errors import DyditError, did_you_mean

USER, BUG = 2, 1

LIKE_AN_OPTION = 0.6
"""Likeness from which an option is taken for a slip in another one."""

_NO_ROOM = {
    errno.ENOSPC: ("The disk is full", "Free some space or choose another folder"),
    errno.EDQUOT: ("The disk quota is used up", "Free some space or choose another folder"),
    errno.EFBIG: (
        "A file would grow beyond the allowed size",
        "Raise the limit (`ulimit -f`) or choose another folder",
    ),
}
_REFUSED = {
    errno.EACCES: ("Permission is denied", "Change the permissions or choose another path"),
    errno.EPERM: ("Permission is denied", "Change the permissions or choose another path"),
    errno.EROFS: ("The file system is read-only", "Choose a folder that can be written"),
    errno.ENOENT: ("A file or folder is missing", "Check the path"),
    errno.ENOTDIR: ("A file stands where a folder is needed", "Choose another path"),
    errno.EISDIR: ("A folder stands where a file is needed", "Choose another path"),
    errno.ENAMETOOLONG: ("A file name is too long", "Choose a shorter path"),
    errno.EIO: ("The disk cannot be read or written", "Check the disk, or use a copy on another one"),
}
_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", re.IGNORECASE
)
_NO_COMMAND = re.compile(r"No such command '(?P<name>.*?)'")


@dataclass(frozen=True)
class Failure:
    """An error's three parts and the exit code that goes with them."""

    what: str
    why: str
    fix: str
    exit_code: int = USER


def failure_of(error: Exception) -> Failure:
    """Explain any exception that a command let through."""
    if isinstance(error, DyditError):
        return Failure(error.what, error.why, error.fix)
    if callable(getattr(error, "format_message", None)):
        return _usage(error)
    for explain in (_no_room, _refused, _memory, _missing_package):
        if failure := explain(error):
            return failure
    said = (str(error).strip().splitlines() or [""])[0]
    return Failure(
        f"dydit stopped on {_name(error)}" + (f": {said}" if said else "."),
        why="Nothing foresaw it, so this is most likely a bug in dydit and no mistake of yours.",
        fix="Run the same command with --debug and report the traceback that it prints.",
        exit_code=BUG,
    )


def _usage(error: Any) -> Failure:
    """Explain what typer says about the arguments, with the nearest name where a name is unknown.

    Typer's classes for these errors moved between its versions, so they are told apart by what they carry.
    """
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "dydit"
    read_help = f"`{command} --help` shows what it takes."
    what = error.format_message().strip()
    option = getattr(error, "option_name", None)
    if option and what.lower().startswith("no such option"):
        return _unknown_option(option, context, command)
    if match := _NO_COMMAND.search(what):
        known = list(context.command.commands) if context else []
        name = match["name"]
        why = f"Its commands are {', '.join(known)}."
        return Failure(f"{command} has no command {name!r}.", why, did_you_mean(name, known) or read_help)
    return Failure(what, "The arguments were not understood, and nothing was run.", read_help)


def _unknown_option(option: str, context: Any, command: str) -> Failure:
    """Name the nearest option, or the key of the recipe that is meant and has no option of its own."""
    what = f"{command} has no option {option}."
    spelled = [name for parameter in context.command.params for name in parameter.opts] if context else []
    known = {name: name for name in spelled if name.startswith("--")}
    if context and context.command.name in STAGES:
        from dydit_cli.recipe.schema import SECTIONS

        keys = SECTIONS[context.command.name].model_fields
        known = {f"--{key.replace('_', '-')}": f"{key}=VALUE" for key in keys} | known
    if option in known:
        return Failure(
            what, "It is a key of the recipe without an option of its own.", f"Write {known[option]}."
        )
    # Without the dashes, which all have in common.
    near = did_you_mean(option.strip("-"), [name.strip("-") for name in known], LIKE_AN_OPTION)
    meant = next(
        (f"did you mean '{meant}'?" for name, meant in known.items() if f"'{name.strip('-')}'" in near), None
    )
    return Failure(what, "Options are spelled out in full.", meant or f"`{command} --help` lists them.")


def _no_room(error: Exception) -> Failure | None:
    """Find a full disk below an error, whatever library wrapped it (safetensors and torch write files themselves)."""
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if match := re.search(r"\(os error (\d+)\)", str(cause)):
            number = int(match[1])
        if number in _NO_ROOM:
            what, fix = _NO_ROOM[number]
            return _system(cause, number, what, f"{fix}, then run the same command again.")
    return None


def _refused(error: Exception) -> Failure | None:
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    what, fix = _REFUSED[error.errno]
    return _system(error, error.errno, what, f"{fix}, then run the same command again.")


def _system(error: BaseException, number: int, what: str, fix: str) -> Failure:
    path = getattr(error, "filename", None)
    return Failure(f"{what}: {path}" if path else f"{what}.", f"The system says: {os.strerror(number)}.", fix)


def _memory(error: Exception) -> Failure | None:
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    ):
        return None
    said = (str(error).strip().splitlines() or ["The system refused to give more memory."])[0]
    return Failure(
        "Memory ran out.",
        why=said,
        fix="Lower batch_size, or use a machine or device with more memory.",
    )


def _missing_package(error: Exception) -> Failure | None:
    if not isinstance(error, ModuleNotFoundError) or not error.name or error.name.startswith("dydit_cli"):
        return None
    return Failure(
        f"The package {error.name} is not installed.",
        why="This command needs it, and Python finds it nowhere.",
        fix="Install dydit again in this environment, which brings what it needs.",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _name(error: BaseException) -> str:
    return type(error).__name__
