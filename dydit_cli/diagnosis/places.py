"""Folders that dydit and its libraries write to: caches, temporary files, the folder where it runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from dydit_cli.diagnosis.check import Check, Verdict

AREA = "folders"
GIGA = 1e9
LITTLE = 2 * GIGA


def check_places(environment: Mapping[str, str]) -> Iterator[Check]:
    """Whether each folder can be written, and how much room there is.

    Args:
        environment: Of the process, whose variables move the caches.
    """
    for name, (folder, variable) in places(environment).items():
        yield check_place(name, folder, variable)


def places(environment: Mapping[str, str]) -> dict[str, tuple[Path, str]]:
    """What a folder is for -> the folder, and the variable that moves it."""
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    compiled = environment.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / "torchinductor"
    return {
        "where it runs": (Path.cwd(), ""),
        "temporary files": (Path(tempfile.gettempdir()), "TMPDIR"),
        "downloads of the Hub": (Path(environment.get("HF_HOME") or cache / "huggingface"), "HF_HOME"),
        "compiled blocks": (Path(compiled), "TORCHINDUCTOR_CACHE_DIR"),
        "fonts of pictures": (
            Path(environment.get("MPLCONFIGDIR") or cache / "matplotlib"),
            "MPLCONFIGDIR",
        ),
    }


def check_place(name: str, folder: Path, variable: str) -> Check:
    """Write into a folder, or into the first folder above it that is there.

    Args:
        name: What it is for.
        folder: It need not exist yet.
        variable: The variable that moves it, for the fix.
    """
    there = next((place for place in (folder, *folder.parents) if place.is_dir()), Path(folder.anchor))
    other = (
        f"Make it writable, or set {variable} to a folder that is."
        if variable
        else "Run it in another folder."
    )
    try:
        if not os.access(there, os.W_OK):
            raise PermissionError(f"no permission to write into {there}")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Check(
            AREA, name, Verdict.WARNING, f"{folder} cannot be written: {error.strerror or error}", other
        )
    free = shutil.disk_usage(there).free
    found = f"{folder}, {free / GIGA:.0f} GB free"
    if free < LITTLE:
        fix = f"Free some space, or set {variable} to a larger disk." if variable else "Free some space."
        return Check(AREA, name, Verdict.WARNING, found, fix)
    return Check(AREA, name, Verdict.GOOD, found)
