"""One file of HTML that holds everything it shows: style, script, pictures and numbers; it asks the network for nothing."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from dydit_cli.artifacts.writing import atomic_write
from dydit_cli.reporting.content import Content

PARTS = Path(__file__).parent / "parts"
DIGITS = 5


def render(content: Content) -> str:
    """The page."""
    # A closing tag inside a text would end the script that holds the numbers.
    values = json.dumps(
        _rounded(content.as_json()), separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    values = values.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = _part("page.html")
    for name, text in (
        ("title", html.escape(content.title)),
        ("style", _part("style.css")),
        ("script", _part("script.js")),
        ("values", values),
    ):
        page = page.replace(f"<!--{name}-->", text, 1)
    return page


def write_page(path: str | Path, content: Content) -> Path:
    """Write the page as one file, whole or not at all.

    Raises:
        DyditError: If the disk refuses.
    """
    path = Path(path)
    with atomic_write(path) as temporary:
        temporary.write_text(render(content), encoding="utf-8")
    return path


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # inf is a legal dial, and no number in JSON.
        return round(value, DIGITS) if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
