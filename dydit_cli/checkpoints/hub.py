"""Checkpoints of the Hugging Face Hub: downloaded when a user names one, and nothing but the model's weights,
configurations and card.

A path that exists is a path; ``owner/name`` that does not exist here is a repository. Weights are safetensors where the repository
has them; older ones have pickled files alone, which are read as data like any other.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from dydit_cli.errors import DyditError

REPOSITORY = re.compile(
    r"(?:hf:)?(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
)
EXPLICIT = "hf:"
FOLDERS = ("transformer/", "")
"""Where a model's weights stand: in a pipeline's repository, or at the top."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
INDEX = ".index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}$")

CARD = "README.md"
"""The model card, whose head says under which licence the weights are."""

Progress = Callable[[str], None]


def is_repository(name: str) -> bool:
    """Whether a name is a repository's: of its form, and no path that is, or could have been, meant."""
    if name.startswith(EXPLICIT):
        return True
    path = Path(name).expanduser()
    if REPOSITORY.fullmatch(name) is None or path.exists() or path.suffix in SUFFIXES:
        return False
    # Where the first folder exists, a file in it was meant that does not.
    return not path.parent.exists()


def download(name: str, on_progress: Progress | None = None) -> Path:
    """Download a repository's model into the Hub's cache, unless it is there, and return its folder or its one file.

    Args:
        name: ``owner/name``, with ``hf:`` before and ``@revision`` behind if wanted.
        on_progress: Told what is downloaded.

    Raises:
        DyditError: If the repository cannot be reached, is not there or holds no weights that dydit reads.
    """
    from huggingface_hub import snapshot_download

    repository, revision = repository_of(name)
    try:
        files, offline = _files(repository, revision)
        wanted = _wanted(files, repository)
        if on_progress is not None and not offline:
            on_progress(f"downloading {len(wanted)} files of {repository} from the Hub")
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(wanted), local_files_only=offline
            )
        )
    except DyditError:
        raise
    except Exception as error:
        raise _unreachable(name, repository, error) from error
    return _model_in(folder, wanted)


def repository_of(name: str) -> tuple[str, str | None]:
    """The ``owner/name`` and the revision that a user's name means.

    Raises:
        DyditError: If it is not of that form.
    """
    match = REPOSITORY.fullmatch(name)
    if match is None:
        raise DyditError(
            f"'{name}' is not the name of a repository of the Hub.",
            why="Such a name is an owner, a slash and a name, with @revision behind it if wanted.",
            fix="Write it like facebook/DiT-XL-2-256.",
        )
    return match["name"], match["revision"]


@contextmanager
def glimpse(name: str, on_progress: Progress | None = None) -> Iterator[Path]:
    """Give a repository's model to a reader of names, shapes and types, without downloading its weights.

    Configurations come as they are. Of each safetensors file its header comes, and stands in a file of the full length that holds
    no numbers and takes no room. A repository with pickled weights alone is downloaded, because these have no such header.

    Args:
        name: As `download` takes it.
        on_progress: Told what is fetched.

    Raises:
        DyditError: As `download`.
    """
    from huggingface_hub import HfApi, snapshot_download

    repository, revision = repository_of(name)
    try:
        files, offline = _files(repository, revision)
        wanted = _wanted(files, repository)
        weights = [file for file in wanted if file.endswith(SUFFIXES)]
        if offline or not all(file.endswith(".safetensors") for file in weights):
            yield download(name, on_progress)
            return
        if on_progress is not None:
            on_progress(f"reading the headers of {len(weights)} files of {repository} on the Hub")
        others = [file for file in wanted if file not in weights]
        settings = (
            Path(snapshot_download(repository, revision=revision, allow_patterns=others))
            if others
            else Path()
        )
        headers = {
            file: HfApi().parse_safetensors_file_metadata(repository, file, revision=revision)
            for file in weights
        }
    except DyditError:
        raise
    except Exception as error:
        raise _unreachable(name, repository, error) from error
    with tempfile.TemporaryDirectory(prefix="dydit-") as place:
        folder = Path(place)
        for file in others:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(settings / file, target)
        for file, header in headers.items():
            _write_hollow(folder / file, header)
        yield _model_in(folder, wanted)


def _write_hollow(path: Path, header: Any) -> None:
    """A safetensors file with a header and a hole for the numbers."""
    content: dict[str, Any] = {
        key: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for key, info in header.tensors.items()
    }
    length = max((info.data_offsets[1] for info in header.tensors.values()), default=0)
    said = {"__metadata__": header.metadata, **content} if header.metadata else content
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + length)


def _model_in(folder: Path, wanted: Sequence[str]) -> Path:
    """The folder of a model; or its only file, where that has a name of its own."""
    weights = [file for file in wanted if file.endswith(SUFFIXES)]
    if len(weights) == 1 and PurePosixPath(weights[0]).stem not in WEIGHT_NAMES:
        return folder / weights[0]
    return folder


def _files(repository: str, revision: str | None) -> tuple[list[str], bool]:
    """The files of a repository, and whether they are those of an earlier download because the Hub cannot be asked."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().list_repo_files(repository, revision=revision), False
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:
        # Offline, no route, a time-out: which class says so depends on the library that the Hub's client uses.
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], True


def _wanted(files: Sequence[str], repository: str) -> list[str]:
    """The files of a repository that make its model.

    Raises:
        DyditError: If there are none, or several models.
    """
    for folder in FOLDERS:
        here = [file for file in files if file.startswith(folder) and "/" not in file.removeprefix(folder)]
        weights = _weights([file for file in here if file.endswith(SUFFIXES)])
        if weights is None:
            raise DyditError(
                f"The repository {repository} holds more than one model.",
                why=f"Weight files in it: {', '.join(file for file in here if file.endswith(SUFFIXES))}.",
                fix="Download the one that you want and pass the file.",
            )
        if weights:
            configurations = [file for file in here if file.endswith(".json")]
            beside = [file for file in files if file in ("model_index.json", CARD)]
            return sorted({*weights, *configurations, *beside})
    raise DyditError(
        f"The repository {repository} holds no weights that dydit reads.",
        why=f"Neither at its top nor in transformer/ is a file that ends in one of {', '.join(SUFFIXES)}.",
        fix="Check the name, or download the weights and pass the file.",
    )


def _weights(files: Sequence[str]) -> list[str] | None:
    """The weight files to take of those in one folder; None if it cannot be told which."""
    by_name: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        by_name.setdefault(SHARD.sub("", path.stem), []).append(file)
    names = [name for name in WEIGHT_NAMES if name in by_name] or list(by_name)
    if len(names) > 1 and names[0] not in WEIGHT_NAMES:
        return None
    if not names:
        return []
    chosen = by_name[names[0]]
    return [file for file in chosen if file.endswith(".safetensors")] or chosen


def _unreachable(name: str, repository: str, error: Exception) -> DyditError:
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if type(error).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        return DyditError(
            f"The Hub does not give the repository {repository}.",
            why=f"It does not exist, or asks for a login: {said}",
            fix="Check the name; for a repository with conditions, accept them on its page and run `hf auth login`.",
        )
    return DyditError(
        f"There is no checkpoint at {name}, and the Hub cannot be asked for a repository of that name.",
        why=f"No file or folder is called so, and {type(error).__name__}: {said}",
        fix="Check the path, or go online; with a copy of the repository, pass its folder.",
    )
