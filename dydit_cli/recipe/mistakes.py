"""One mistake of a recipe or of the command line, and the error that reports all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.recipe.schema import SECTIONS
from dydit_cli.recipe.values import shown

COMMAND_LINE = "command line"

_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True)
class Place:
    """Where something was written: a line of a file, the file as a whole, or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Mistake:
    """One thing to correct: where, which key (`section.key`, may be empty) and what is wrong with it."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.message) if part)


def refuse(mistakes: Sequence[Mistake]) -> DyditError:
    """Return the error that lists `mistakes`, those of files first, in the order of their lines."""
    ordered = sorted(
        mistakes, key=lambda mistake: (mistake.place.source == COMMAND_LINE, mistake.place.line or 0)
    )
    places = list(dict.fromkeys(mistake.place.source for mistake in ordered))
    files = [place for place in places if place != COMMAND_LINE]
    where = ([f"in {' and '.join(files)}"] if files else []) + (
        ["on the command line"] if COMMAND_LINE in places else []
    )
    if len(ordered) == 1:
        what = str(ordered[0])
    else:
        what = "\n".join(
            [f"{len(ordered)} mistakes {' and '.join(where)}:", *(f"  {mistake}" for mistake in ordered)]
        )
    check = f"`dydit recipes validate {files[0]}`" if files else "the command's --help"
    return DyditError(
        what,
        why="Every key is checked before anything runs; nothing was run or written.",
        fix=f"Correct {'it' if len(ordered) == 1 else 'them'} and run the command again; {check} helps, and "
        "`dydit recipes show NAME --resolved` prints every key.",
    )


def unknown(name: str, known: Iterable[str], kind: str = "key") -> str:
    """Say that `name` is unknown: in which sections it would be at home, or else which known name is near."""
    if homes := [stage for stage, section in SECTIONS.items() if name in section.model_fields]:
        *others, last = homes
        return f"unknown {kind} here; it is a key of {' and '.join([', '.join(others), last] if others else [last])}"
    known = list(known)
    near = did_you_mean(name, known)
    return f"unknown {kind}, {near}" if near else f"unknown {kind}; known are {', '.join(known)}"


def explain(error: Mapping[str, Any]) -> str:
    """Translate one entry of a pydantic `ValidationError.errors()` into plain words."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]:g}, got {shown(value)}"
    if kind == "finite_number":
        return f"must be a finite number, got {shown(value)}"
    if kind == "literal_error":
        # The alternatives come as "'a', 'b' or 'c'".
        near = did_you_mean(
            str(value), [part for part in str(context["expected"]).split("'") if part.strip(" ,or")]
        )
        return f"must be {context['expected']}, got {shown(value)}" + (f", {near}" if near else "")
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {shown(value)}"
