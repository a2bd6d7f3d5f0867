"""From what a user writes where a checkpoint is expected to a path: a shipped model, a path, or a repository of the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dydit_cli.checkpoints.builtin import PREFIX, builtin_path
from dydit_cli.checkpoints.hub import Progress, download, glimpse, is_repository, repository_of
from dydit_cli.checkpoints.terms import Terms, terms_of


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


def terms_of_name(name: str | Path, place: Path) -> Terms:
    """Under which licence a checkpoint was published, as far as it is known.

    Args:
        name: As `located` takes it.
        place: What that gave.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return Terms(license="mit", said_by=text)
    return terms_of(place, repository_of(text)[0] if is_repository(text) else None)


@contextmanager
def glimpsed(name: str | Path, on_progress: Progress | None = None) -> Iterator[Path]:
    """`located`, for a reader of names and shapes alone: weights of a repository of the Hub are not downloaded.

    Args:
        name: As `located` takes it.
        on_progress: Told what is fetched.

    Raises:
        DyditError: As `located`.
    """
    text = str(name)
    if text.startswith(PREFIX) or not is_repository(text):
        yield located(text)
        return
    with glimpse(text, on_progress) as path:
        yield path
