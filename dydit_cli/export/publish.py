"""Put a finished export on the Hugging Face Hub, with the login that the Hub's own client keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import atomic_write
from dydit_cli.checkpoints.hub import CARD, REPOSITORY
from dydit_cli.errors import DyditError
from dydit_cli.shell import quoted

USE = "## Use\n\n"

LEFT_OUT = ("recipe.yaml", "manifest.json")
"""Say where files lay on this machine, which is nobody's business who downloads the model."""

EVERYTHING = "*"
"""What a new commit deletes of an older one: shards of another number, say, which diffusers would load in the place of the new
ones. Files that are uploaded again stay, and the Hub's client spares ``.gitattributes``."""

MISSING = "RepositoryNotFoundError"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Destination:
    """A repository of the Hub as it is before an upload.

    Attributes:
        repository: ``owner/name``.
        exists: Whether it is there, and gets a new commit.
        private: Whether it is, or will be, seen by its owner alone.
    """

    repository: str
    exists: bool
    private: bool


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


def check_login(repository: str, *, private: bool, overwrite: bool) -> Destination:
    """Ask the Hub who is logged in and what the repository is, before hours are spent on an export.

    Args:
        repository: ``owner/name``.
        private: Whether it is to be seen by its owner alone.
        overwrite: Whether a repository that is there may get a new commit.

    Raises:
        DyditError: If nobody is logged in, the Hub cannot be asked, or the repository is there and may not be changed, or is seen by
            everybody where it must not be.
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
    if not _asked(repository, lambda: client.repo_exists(repository)):
        return Destination(repository, exists=False, private=private)
    if not overwrite:
        raise _taken(repository)
    hidden = bool(_asked(repository, lambda: client.repo_info(repository)).private)
    if private and not hidden:
        raise DyditError(
            f"The repository {repository} exists, and everybody sees it.",
            why="--private is about a new repository; a new commit does not hide one that is there.",
            fix="Choose another name, make that repository private on the Hub first, or leave --private out.",
        )
    return Destination(repository, exists=True, private=hidden)


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


def publish(folder: Path, destination: Destination, say: Progress) -> str:
    """Upload an export.

    Args:
        folder: The export, finished and verified.
        destination: As `check_login` found it. What else is in a repository that exists is deleted.
        say: Told what is being done.

    Returns:
        The repository's address.

    Raises:
        DyditError: If it cannot be made or written; the export stays where it is.
    """
    from huggingface_hub import HfApi

    client, repository = HfApi(), destination.repository
    address_card(folder, repository)
    say(f"uploading to {repository}")
    try:
        made: Any = _asked(
            repository,
            lambda: client.create_repo(
                repository, repo_type="model", private=destination.private, exist_ok=destination.exists
            ),
        )
        _asked(
            repository,
            lambda: client.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                ignore_patterns=list(LEFT_OUT),
                delete_patterns=EVERYTHING if destination.exists else None,
                commit_message="Export of dydit",
            ),
        )
    except DyditError as error:
        raise DyditError(
            error.what,
            why=error.why,
            fix=f"{error.fix} The export itself is whole; `{_by_hand(folder, destination)}` uploads it later.",
        ) from error
    return str(made)


def _by_hand(folder: Path, destination: Destination) -> str:
    """A command of the Hub's client that uploads the same files in the same way."""
    from huggingface_hub import __version__

    # Before 1.0 the last of several --exclude counts, since then each takes one pattern.
    between = " " if int(__version__.partition(".")[0]) < 1 else " --exclude "
    words = ["hf upload", destination.repository, quoted(folder), f"--exclude {between.join(LEFT_OUT)}"]
    if destination.private:
        words.append("--private")
    if destination.exists:
        words.append(f"--delete {quoted(EVERYTHING)}")
    return " ".join(words)


def _taken(repository: str) -> DyditError:
    return DyditError(
        f"The repository {repository} exists already.",
        why="Its files would be replaced.",
        fix="Choose another name, or pass --overwrite for a new commit in it.",
    )


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
        return _taken(repository)
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
            fix="Try again later.",
        )
    return DyditError(
        "The Hub cannot be reached.",
        why=f"{kind}: {said}",
        fix="Go online, and see that HF_HUB_OFFLINE is not set.",
    )
