"""`.npz` archives of images as ADM's evaluation has them (`arr_0`, N x H x W x 3 bytes), and of videos (N x F x H x W x C)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.inputs.source import ImageBatch
from dydit_cli.processes.world import ALONE, World

NAMES = ("arr_0", "images", "videos", "x")
LABEL_NAMES = ("arr_1", "labels", "y")


@dataclass(frozen=True)
class ArchiveImages:
    """Images of an archive. See `ImageSource`."""

    path: Path
    array: NDArray[np.uint8]
    labels: list[int] | None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int | None:
        """See `ImageSource`."""
        return self.array.shape[1] if self.array.ndim == 5 else None

    @property
    def kind(self) -> str:
        """See `ImageSource`."""
        return "npz" if self.frames is None else "video npz"

    def __len__(self) -> int:
        return len(self.array)

    def batches(self, size: int, world: World = ALONE) -> Iterator[ImageBatch]:
        """See `ImageSource`."""
        for start in range(world.rank * size, len(self), world.size * size):
            yield ImageBatch(torch.from_numpy(self.array[start : start + size]))

    def describe(self) -> dict[str, Any]:
        """See `ImageSource`."""
        count = {"images": len(self)} if self.frames is None else {"videos": len(self), "frames": self.frames}
        return {"kind": self.kind, "path": str(self.path), **count, **self.facts}


def names_in(path: Path) -> list[str]:
    """Names of an archive's arrays.

    Raises:
        DyditError: If it is missing or no archive.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DyditError(
            f"{path} cannot be read as an .npz archive.",
            why=f"{'No such file exists' if not path.exists() else str(error).splitlines()[0]}.",
            fix="Check the path, or write the file again with numpy.savez.",
        ) from error


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Those of the named arrays that an archive holds; pickled objects are refused.

    Raises:
        DyditError: If one is damaged.
    """
    present = [name for name in names if name in names_in(path)]
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in present}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DyditError(
            f"{path} is damaged.",
            why=f"One of its arrays cannot be read: {error}.",
            fix="Copy or write the file again.",
        ) from error


def open_archive(path: Path, limit: int | None = None) -> ArchiveImages:
    """Read the images or videos of an archive.

    Raises:
        DyditError: If it holds none.
    """
    found = read_arrays(path, (*NAMES, *LABEL_NAMES))
    array = next((found[name] for name in NAMES if name in found), None)
    if array is None or array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] not in (1, 3):
        held = (
            "no array of these names" if array is None else f"an array of {array.dtype}, shape {array.shape}"
        )
        raise DyditError(
            f"{path} holds no images.",
            why=f"Images are bytes (uint8), N x H x W x C or N x F x H x W x C, C 1 or 3, called {', '.join(NAMES)}; "
            f"it holds {held}.",
            fix="Write it as ADM's evaluation does: numpy.savez(path, images), or pass a folder of images.",
        )
    labels = next((found[name] for name in LABEL_NAMES if name in found), None)
    fits = labels is not None and labels.shape == (len(array),) and labels.dtype.kind in "iu"
    return ArchiveImages(
        path, array[:limit], [int(label) for label in labels[:limit]] if labels is not None and fits else None
    )
