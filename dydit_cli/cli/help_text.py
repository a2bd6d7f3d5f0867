"""Help texts in the form that typer wants them."""

from __future__ import annotations

from collections.abc import Sequence


def examples(lines: Sequence[str]) -> str:
    """Return command lines as a help epilog, which typer reads as markup and whose single line breaks it drops."""
    escaped = (line.replace("[", "\\[") for line in lines)
    return "\n\n".join(["[bold]Examples[/bold]", *escaped])


def flowing(text: str) -> str:
    """Return a docstring with each paragraph on one line, so that help wraps to the terminal and not to the source."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
