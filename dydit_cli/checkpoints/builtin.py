"""The trained base models that the package ships, named ``builtin:NAME`` wherever a checkpoint is expected."""

from __future__ import annotations

import json
from pathlib import Path

from dydit_cli.errors import DyditError, did_you_mean

PREFIX = "builtin:"
SUFFIXES = (".pt", ".safetensors")
FOLDER = Path(__file__).parent.parent / "assets" / "models"


def builtin_models() -> dict[str, dict[str, object]]:
    """Facts of the shipped models by name: family, constructor arguments and training, as their file of facts says."""
    facts = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
    return {Path(name).stem: entry for name, entry in facts.items() if name.endswith(SUFFIXES)}


def builtin_path(name: str) -> Path:
    """Return the file of a shipped model, ``name`` without the prefix.

    Raises:
        DyditError: If there is none, with the nearest name.
    """
    known = builtin_models()
    if name in known:
        return next(path for path in (FOLDER / f"{name}{suffix}" for suffix in SUFFIXES) if path.exists())
    raise DyditError(
        f"There is no shipped model called '{name}'.",
        why=f"The package holds {', '.join(PREFIX + entry for entry in known)}.",
        fix=did_you_mean(name, known) or "Pass one of these, or the path of a checkpoint.",
    )
