"""What a user writes after ``--data``, taken apart: ``NAME``, ``PATH``, ``NAME:PATH``, each with ``:option=value``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dydit_cli.errors import DyditError, did_you_mean

OPTIONS = ("frame_interval",)


@dataclass(frozen=True)
class DataSpec:
    """Where the data are and how they are read.

    Attributes:
        name: Everything before the options.
        frame_interval: Distance between the frames of a clip; None if not given.
    """

    name: str
    frame_interval: int | None = None


def parse_spec(spec: str | Path) -> DataSpec:
    """Split the options off. A path that exists as it stands has none, whatever colons it contains.

    Raises:
        DyditError: for an unknown option or a value that is no positive whole number.
    """
    text = str(spec)
    name, colon, option = text.rpartition(":")
    if not colon or "=" not in option or {"/", "\\"} & set(option) or Path(text).expanduser().exists():
        return DataSpec(text)
    key, _, value = option.partition("=")
    if key not in OPTIONS:
        raise DyditError(
            f"'{key}' is not an option of data.",
            why=f"{did_you_mean(key, OPTIONS) or 'There is one, frame_interval, for folders of videos.'}".capitalize(),
            fix=f"Write {name}:frame_interval=2, say, or {name} alone.",
        )
    if not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise DyditError(
            f"A frame_interval of '{value}' is not possible.",
            why="It is the distance from one frame of a clip to the next: a whole number from 1.",
            fix=f"Write {name}:frame_interval=2, say.",
        )
    return DataSpec(name, int(value))
