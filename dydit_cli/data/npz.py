"""``.npz`` files: images or videos (images/labels, ADM's arr_0/arr_1, or x/y), or latents with their scale."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dydit_cli.data import latents
from dydit_cli.data.images import ArrayImages, in_unit_range, planar, planar_videos
from dydit_cli.data.latents import Latents
from dydit_cli.data.source import (
    SampleGeometry,
    checked_labels,
    of_video,
    refuse_images_for_latent_model,
    sample_shape,
)
from dydit_cli.errors import DyditError

IMAGE_NAMES = ("images", "arr_0", "x")
IMAGE_LABEL_NAMES = {"images": ("labels",), "arr_0": ("arr_1",), "x": ("y",)}


def read_npz(path: Path, geometry: SampleGeometry, *, latent: bool) -> ArrayImages | Latents:
    """Read images or latents from an .npz file.

    The file holds latents if it states a scale or names an array ``latents`` or ``moments``; else it holds
    images.

    Raises:
        DyditError: for a damaged file, missing arrays, or samples that do not fit the model.
    """
    with _damage_explained(path):
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("its content is a single array, not an archive")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    names = set(arrays)
    if names & {"latents", "latent", "moments", *latents.SCALE_NAMES}:
        return latents.from_arrays(arrays, path, geometry)
    if latent:
        floats = [name for name in latents.LATENT_NAMES if name in arrays and arrays[name].dtype.kind == "f"]
        # Floats with the model's channels are latents that forgot their scale; anything else is pixels.
        found: tuple[int, ...] = arrays[floats[0]].shape if floats else ()
        if len(found) == len(sample_shape(geometry)) + 1 and found[-3] % geometry.in_channels == 0:
            return latents.from_arrays(arrays, path, geometry)
        raise refuse_images_for_latent_model(path, geometry)
    return _images(arrays, path, geometry)


def _images(arrays: Mapping[str, NDArray[Any]], path: Path, geometry: SampleGeometry) -> ArrayImages:
    name = next((name for name in IMAGE_NAMES if name in arrays), None)
    if name is None:
        raise DyditError(
            f"{path} has no array of images.",
            why=f"It holds {', '.join(sorted(arrays)) or 'nothing'}; images are looked for under "
            f"{', '.join(IMAGE_NAMES)}.",
            fix="Save the arrays as `images` and `labels`.",
        )
    candidates = (*IMAGE_LABEL_NAMES[name], "labels", "y", "arr_1")
    label_name = next((candidate for candidate in candidates if candidate in arrays), None)
    if label_name is None and geometry.num_classes > 1:
        raise DyditError(
            f"{path} has no labels.",
            why=f"The model is class-conditional; beside `{name}` the labels are "
            f"`{IMAGE_LABEL_NAMES[name][0]}`.",
            fix="Save one integer an image as `labels`.",
        )
    stored = in_unit_range(arrays[name], path) if arrays[name].size else arrays[name]
    video = of_video(geometry)
    images = planar(stored, path, geometry) if video is None else planar_videos(stored, path, video)
    labels = checked_labels(arrays.get(label_name or ""), len(images), geometry.num_classes, path)
    return ArrayImages(images, labels, padding=0, kind="npz", path=path)


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError) as error:
        raise DyditError(
            f"{path} cannot be read as an .npz archive.",
            why=f"{error}.",
            fix="Write the file again with numpy.savez, as numbers; it may be truncated.",
        ) from error
