"""Under which licence a checkpoint was published, as far as the files that came with it say.

Nothing is guessed: a card's head and a file's own metadata name a licence; a licence's text is recognised where it lies in the
folder of the model itself, not beside a single file, where it may belong to anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
TEXTS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING")
CACHED = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots")
"""A repository's folder in the Hub's cache."""

OTHER = "other"
PHRASES = (
    ("apache license", "version 2.0", "apache-2.0"),
    ("mit license", "permission is hereby granted, free of charge", "mit"),
    ("attribution-noncommercial-sharealike 4.0", "creative commons", "cc-by-nc-sa-4.0"),
    ("attribution-noncommercial 4.0", "creative commons", "cc-by-nc-4.0"),
    ("attribution 4.0 international", "creative commons", "cc-by-4.0"),
    ("creative ml open rail-m", "", "creativeml-openrail-m"),
)
"""Two phrases of a licence's text, and its identifier."""

LONGEST_TEXT = 20_000
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Terms:
    """What is known of where a checkpoint was published, and under which licence.

    Attributes:
        license: Identifier as the Hub's cards write it, ``other`` for one with a name of its own; None if nothing says.
        name: Of a licence without an identifier.
        link: To its text.
        said_by: The file that says so.
        repository: ``owner/name`` on the Hub.
    """

    license: str | None = None
    name: str | None = None
    link: str | None = None
    said_by: str | None = None
    repository: str | None = None

    def as_json(self) -> dict[str, str]:
        """What is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def terms_of(path: Path, repository: str | None = None) -> Terms:
    """Read what the files with a checkpoint say.

    Args:
        path: The checkpoint's file or folder.
        repository: Its name on the Hub, where the user named that.
    """
    repository = repository or _cached(path)
    if path.is_dir():
        folders = [path, *([path.parent] if path.name == "transformer" else [])]
        own = True
    else:
        folders, own = [path.parent], repository is not None
    for folder in folders:
        if (found := _of_card(folder / CARD)) is not None:
            return Terms(*found, str(folder / CARD), repository)
    if path.suffix == ".safetensors" and (found := _of_header(path)) is not None:
        return Terms(*found, str(path), repository)
    for folder in folders if own else []:
        for name in TEXTS:
            if (text := _text(folder / name)) is not None:
                identifier = recognised(text)
                return Terms(
                    identifier or OTHER, None if identifier else _title(text), None, name, repository
                )
    return Terms(repository=repository)


def recognised(text: str) -> str | None:
    """The identifier of a licence by its text; None for one that is not known here."""
    words = " ".join(text.lower().split())
    return next((name for first, second, name in PHRASES if first in words and second in words), None)


def front_matter(text: str) -> dict[str, Any]:
    """The head of a card; empty if it has none."""
    match = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _of_card(path: Path) -> tuple[str, str | None, str | None] | None:
    text = _text(path)
    return None if text is None else _named(front_matter(text), "license", "license_name", "license_link")


def _of_header(path: Path) -> tuple[str, str | None, str | None] | None:
    """What a safetensors file says of itself, in the keys that trainers and mergers write."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            content = json.loads(stream.read(length)) if length < LONGEST_HEADER else {}
    except (OSError, ValueError):
        return None
    metadata = content.get("__metadata__") if isinstance(content, dict) else None
    if not isinstance(metadata, dict):
        return None
    for prefix in ("", "modelspec."):
        if (
            found := _named(metadata, f"{prefix}license", f"{prefix}license_name", f"{prefix}license_link")
        ) is not None:
            return found
    return None


def _named(
    content: Mapping[str, Any], license_key: str, name_key: str, link_key: str
) -> tuple[str, str | None, str | None] | None:
    said = content.get(license_key)
    if isinstance(said, list):
        said = said[0] if said else None
    if not isinstance(said, str) or not said.strip():
        return None
    name, link = content.get(name_key), content.get(link_key)
    return said.strip(), str(name) if name else None, str(link) if link else None


def _cached(path: Path) -> str | None:
    match = CACHED.search(str(path.absolute()))
    return f"{match['owner']}/{match['name']}" if match else None


def _text(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(LONGEST_TEXT)
    except OSError:
        return None


def _title(text: str) -> str | None:
    """The first line with words in it, as a name."""
    line = next((line.strip(" #*") for line in text.splitlines() if line.strip(" #*")), "")
    return line[:80] or None
