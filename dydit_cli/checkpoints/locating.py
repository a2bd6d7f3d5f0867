"""From what a user writes where a checkpoint is expected to a path: a shipped model, a path, or a repository of the Hub."""

from __future__ import annotations

from pathlib import Path

from dydit_cli.checkpoints.builtin import PREFIX, builtin_path
from dydit_cli.checkpoints.hub import Progress, download, is_repository


def located(name: str | Path, on_progress: Progress | None = None) -> Path:
    """The path of a checkpoint; a repository of the Hub (``owner/name``) is downloaded, or found where it was before.

    Args:
        name: ``builtin:NAME``, a path, or ``owner/name`` of a repository, with ``@revision`` if not its newest.
        on_progress: Told what is downloaded.

    Raises:
        DyditError: If there is no such shipped model, or the repository cannot be reached or holds no model.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return builtin_path(text.removeprefix(PREFIX))
    if is_repository(text):
        return download(text, on_progress)
    return Path(text).expanduser()
