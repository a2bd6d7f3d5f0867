"""The training images of a folder of IDX files (Fashion-MNIST's original form), as a reference."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from dydit_cli.data.idx import read_idx
from dydit_cli.evaluation.inputs.archive import ArchiveImages

STEMS = ("train-images-idx3-ubyte", "train-images.idx3-ubyte")


def training_images(folder: Path) -> Path | None:
    """The file of training images, if the folder has one."""
    names = (folder / f"{stem}{suffix}" for stem in STEMS for suffix in (".gz", ""))
    return next((path for path in names if path.is_file()), None)


def open_idx(path: Path, limit: int | None = None) -> ArchiveImages:
    """The images of an IDX file as grey images.

    Raises:
        DyditError: If the file is damaged.
    """
    return ArchiveImages(path, read_idx(path, 3)[:limit, ..., None].copy(), None)


def packaged_subset() -> Path:
    """The 10,000 training images that are shipped."""
    return Path(str(files("dydit_cli"))) / "assets" / "fashion-mnist" / "train-images-idx3-ubyte.gz"
