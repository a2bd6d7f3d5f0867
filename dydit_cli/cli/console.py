"""Where the command line writes: results on stdout, everything else on stderr, so that `dydit … --json | jq` works.

Text is printed as it is. Markup, highlighting and emoji codes are off, because paths and class names hold brackets and
colons; style with `style=` or `rich.text.Text`. What goes to a file or a pipe is never wrapped.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_COLUMNS = 200

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quieted(on: bool) -> Iterator[None]:
    """Leave out notes, hints and progress while the block runs; results, warnings and errors stay.

    Args:
        on: Whether to do so (`--quiet`).
    """
    token = _QUIET.set(on)
    try:
        yield
    finally:
        _QUIET.reset(token)


def settle_streams() -> None:
    """Let what a stream's encoding has no sign for be escaped instead of ending the command: pipes on Windows are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


def results() -> Console:
    """Return the console for results, on stdout."""
    return _console(stderr=False)


def notes() -> Console:
    """Return the console for progress and hints, on stderr; it says nothing under `quieted`."""
    console = _console(stderr=True)
    console.quiet = _QUIET.get()
    return console


def say(text: str, style: str = "") -> None:
    """Write a line of result on stdout, never wrapped."""
    results().print(text, style=style, soft_wrap=True)


def note(text: str, style: str = "") -> None:
    """Write a line on stderr, never wrapped."""
    notes().print(text, style=style, soft_wrap=True)


def warn(text: str) -> None:
    """Write a warning on stderr."""
    _console(stderr=True).print(f"warning: {text}", style="yellow", soft_wrap=True)


def emit_json(value: Any) -> None:
    """Write `value` as JSON on stdout; paths become text.

    Raises:
        ValueError: It holds a number that JSON has no word for (nan, inf).
    """
    # Escapes of JSON's own where the stream has not all signs, so that it stays JSON.
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    sys.stdout.write(
        json.dumps(value, indent=2, ensure_ascii=plain, allow_nan=False, default=_as_json) + "\n"
    )


def explain(what: str, why: str, fix: str) -> None:
    """Write an error's three parts on stderr."""
    from rich.text import Text

    console = _console(stderr=True)
    console.print(Text(what, style="bold red"), soft_wrap=True)
    for name, part in (("why", why), ("fix", fix)):
        console.print(Text.assemble("  ", (f"{name}: ", "bold"), part), soft_wrap=True)


def can_ask() -> bool:
    """Whether a person sits at the terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str, choices: Sequence[str] = ()) -> str | None:
    """Ask at a terminal; return None where nobody can answer (no terminal, or end of input).

    Args:
        question: The question, without a colon.
        choices: Accepted answers; anything that is not empty if none are given.
    """
    if not can_ask():
        return None
    offer = f" ({'/'.join(choices)})" if choices else ""
    while True:
        _console(stderr=True).print(f"{question}{offer}: ", end="")
        answer = sys.stdin.readline()
        if not answer:
            return None
        if (answer := answer.strip()) and (not choices or answer in choices):
            return answer


def _as_json(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _console(stderr: bool) -> Console:
    """Make a console for the streams of this moment, which tests and shells replace."""
    from rich.console import Console

    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        # rich takes 80 columns for a pipe and would cut tables and paths to them.
        console.width = max(console.width, _PIPE_COLUMNS)
    return console
