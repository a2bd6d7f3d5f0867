"""What is said of a file that should be a checkpoint and cannot be read."""

from __future__ import annotations

from pathlib import Path

from dydit_cli.errors import DyditError


def unreadable(path: Path, error: Exception) -> DyditError:
    """The error for a file that is cut short or damaged, with what the reader said of it."""
    size = path.stat().st_size if path.exists() else 0
    # torch adds advice of several sentences, for files of its own only.
    said = str(error).splitlines()[0].split(". ")[0][:160].rstrip(".") if str(error) else type(error).__name__
    return DyditError(
        f"{path} cannot be read as a checkpoint.",
        why=f"The file is cut short or damaged, or not a checkpoint: {size:,} bytes, {said}.",
        fix="Compare its size with the source's and copy or download it again.",
    )
