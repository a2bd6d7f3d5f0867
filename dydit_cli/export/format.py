"""What a format of exports is to the command: a name, a function that writes it, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dydit_cli.export.report import ExportReport, Progress, Source
from dydit_cli.recipe.schema import ExportSection

Check = Callable[[Source, ExportSection], None]
"""Refuse, by a `DyditError`, what the format does not write of a source or with these settings, as far as that is known without its
weights: `dydit export --dry-run` asks this and nothing more."""

Write = Callable[[Source, ExportSection, Path, Progress], ExportReport]
"""Write a source into an empty folder, verify what was written, and tell of it; raises a `DyditError` and leaves the rest to
`export`, which removes the folder then."""


@dataclass(frozen=True)
class Format:
    """A format that `dydit export` writes.

    Attributes:
        name: As given to ``--format``.
        summary: For the help: what is written, in a few words.
        families: Names of the families that it takes.
        check: Refuses what it does not take.
        write: Writes it, after `check`.
        options: Of `OPTIONS`, those that it takes; the others are refused before anything is read.
        instead: What to do with a family that it does not take.
    """

    name: str
    summary: str
    families: tuple[str, ...]
    check: Check
    write: Write
    options: frozenset[str] = frozenset()
    instead: str = "Pass --format diffusers."


OPTIONS = ("steps", "sampler", "timestep")
"""Keys of the section that belong to some formats alone; a format with further limits (``vae``, ``budget``) says so itself."""
