"""From a path to what lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.inputs.archive import open_archive
from dydit_cli.evaluation.inputs.folder import open_folder
from dydit_cli.evaluation.inputs.idx import open_idx, training_images
from dydit_cli.evaluation.inputs.kinds import is_model
from dydit_cli.evaluation.inputs.model import SamplingSettings, open_model
from dydit_cli.evaluation.inputs.source import ImageSource


def open_source(
    path: Path,
    settings: SamplingSettings,
    on_progress: Callable[[float], None] | None = None,
    limit: int | None = None,
    videos: bool = False,
) -> ImageSource:
    """Open a model, a folder of images, frames or IDX files, or an archive.

    Args:
        path: Of any of these.
        settings: For a model.
        on_progress: For a model.
        limit: Take the first so many images of a folder or archive.
        videos: Folders in a folder are videos, not classes.

    Raises:
        DyditError: If nothing that can be evaluated is there.
    """
    if path.suffix == ".npz":
        return open_archive(path, limit)
    if not path.is_dir():
        raise DyditError(
            f"There is nothing to evaluate at {path}.",
            why="It is a file of another kind." if path.exists() else "No such file or folder exists.",
            fix="Pass a model's folder, a folder of images, the --out of `dydit sample`, or an .npz archive.",
        )
    if is_model(path):
        return open_model(path, settings, on_progress)
    if packed := training_images(path):
        return open_idx(packed, limit)
    return open_folder(path, limit, videos)
