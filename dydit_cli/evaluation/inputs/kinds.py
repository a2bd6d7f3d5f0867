"""What lies at a path, told without reading it: light, because the command line asks before it knows what will run."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"


def is_model(path: Path) -> bool:
    """Whether a folder holds a model, or an exported pipeline."""
    return any((folder / CONFIG).is_file() for folder in (path, path / "transformer"))
