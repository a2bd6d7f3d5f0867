"""Put a finished export on the Hugging Face Hub, with the login that the Hub's own client keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import atomic_write
from dydit_cli.checkpoints.hub import CARD, REPOSITORY
from dydit_cli.errors import DyditError
from dydit_cli.shell import quoted

USE = "## Use\n\n"

LEFT_OUT = ("recipe.yaml", "manifest.json")
"""Say where files lay on this machine, which is nobody's business who downloads the model."""

MISSING = "RepositoryNotFoundError"

Progress = Callable[[str], None]


def check_destination(repository: str) -> None:
    """See that a name can be a repository's, before anything is exported.

    Raises:
        DyditError: If it cannot.
    """
    match = REPOSITORY.fullmatch(repository)
    if match is None or match["revision"] is not None or match["name"] != repository:
        raise DyditError(
            f"'{repository}' is not the name of a repository of the Hub.",
            why="Such a name is an owner, a slash and a name, of letters, digits, dots, dashes and underscores.",
            fix="Write it like --push-to-hub yourname/dit-dynamic.",
        )


def check_login(repository: str, overwrite: bool) -> None:
    """Ask the Hub who is logged in and whether the repository is there, before hours are spent on an export.

    Args:
        repository: ``owner/name``.
        overwrite: Whether a repository that is there may get a new commit.

    Raises:
        DyditError: If nobody is logged in, the Hub cannot be asked, or the repository is there and may not be changed.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise DyditError(
            "Nobody is logged in to the Hub on this machine.",
            why="An upload needs a token that may write, and the Hub's client keeps none here.",
            fix="Run `hf auth login`, or set HF_TOKEN; a token with the right to write is made at huggingface.co/settings/tokens.",
        )
    client = HfApi()
    _asked(repository, client.whoami)
    if not overwrite and _asked(repository, lambda: client.repo_exists(repository)):
        raise DyditError(
            f"The repository {repository} exists already.",
            why="Its files would be replaced.",
            fix="Choose another name, or pass --overwrite for a new commit in it.",
        )


def upload_list(folder: Path) -> list[tuple[str, int]]:
    """Names and bytes of the files that are uploaded, sorted."""
    return [
        (file.relative_to(folder).as_posix(), file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).as_posix() not in LEFT_OUT
    ]


def address_card(folder: Path, repository: str) -> None:
    """Say in a card whose code runs beside the folder how the folder gets there."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8")
    command = f"hf download {repository} --local-dir {folder.resolve().name}"
    if USE in text and command not in text:
        with atomic_write(card) as temporary:
            temporary.write_text(text.replace(USE, f"{USE}```sh\n{command}\n```\n\n", 1), encoding="utf-8")


def publish(folder: Path, repository: str, *, private: bool, overwrite: bool, say: Progress) -> str:
    """Upload an export.

    Args:
        folder: The export, finished and verified.
        repository: ``owner/name``.
        private: Whether a new repository is seen by its owner alone.
        overwrite: Whether a repository that is there may get a new commit.
        say: Told what is being done.

    Returns:
        The repository's address.

    Raises:
        DyditError: If it cannot be made or written; the export stays where it is.
    """
    from huggingface_hub import HfApi

    client = HfApi()
    address_card(folder, repository)
    say(f"uploading to {repository}")
    try:
        made: Any = _asked(
            repository,
            lambda: client.create_repo(repository, repo_type="model", private=private, exist_ok=overwrite),
        )
        _asked(
            repository,
            lambda: client.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                ignore_patterns=list(LEFT_OUT),
                commit_message="Export of dydit",
            ),
        )
    except DyditError as error:
        later = f"`hf upload {repository} {quoted(folder)}`"
        raise DyditError(
            error.what,
            why=error.why,
            fix=f"{error.fix} The export itself is whole; {later} uploads it later.",
        ) from error
    return str(made)


def _asked(repository: str, call: Callable[[], Any]) -> Any:
    """What the Hub answers; what goes wrong becomes a `DyditError`."""
    try:
        return call()
    except Exception as error:
        raise _explained(repository, error) from error


def _explained(repository: str, error: Exception) -> DyditError:
    said = (str(error).strip().splitlines() or [""])[0][:200]
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    if status == 409:
        return DyditError(
            f"The repository {repository} exists already.",
            why="Its files would be replaced.",
            fix="Choose another name, or pass --overwrite for a new commit in it.",
        )
    if status == 401 or kind == "LocalTokenNotFoundError":
        return DyditError(
            "The Hub does not accept this machine's login.",
            why=f"It says: {said}",
            fix="Run `hf auth login` with a token that may write.",
        )
    if status == 403 or kind == MISSING:
        return DyditError(
            f"The Hub does not let you write to {repository}.",
            why=f"It says: {said}",
            fix="Use your own name or an organisation's that you belong to, and a token that may write.",
        )
    if status is not None:
        return DyditError(
            f"The Hub refused to take {repository}.",
            why=f"It says: {said}",
            fix="Try again later; the export stays where it is.",
        )
    return DyditError(
        "The Hub cannot be reached.",
        why=f"{kind}: {said}",
        fix="Go online and run `dydit export` with --push-to-hub again; HF_HUB_OFFLINE must not be set.",
    )
