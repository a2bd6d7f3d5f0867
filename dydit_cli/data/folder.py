"""A folder of images, one sub-folder a class, read when needed and centre-cropped as in ADM and DiT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dydit_cli.data.source import Draw, SampleGeometry
from dydit_cli.errors import DyditError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder:
    """Images in class folders; the label is the position of the folder's name in sorted order.

    Args:
        folder: The folder that holds a folder a class.
        geometry: The model's input: images are cropped to its size and converted to its channels.

    Raises:
        DyditError: for no class folders, a class without images, or more classes than the model has.
    """

    def __init__(self, folder: Path, geometry: SampleGeometry) -> None:
        self.folder = folder
        self.size = geometry.sample_size
        self.mode = "L" if geometry.in_channels == 1 else "RGB"
        self.classes = _class_folders(folder)
        if len(self.classes) > geometry.num_classes:
            raise DyditError(
                f"{folder} has {len(self.classes)} class folders, the model has {geometry.num_classes} "
                "classes.",
                why="Each class folder needs a label of its own.",
                fix="Remove class folders, or use a model with as many classes.",
            )
        self.names: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = _images_below(folder / name)
            if not found:
                raise DyditError(
                    f"The class folder {folder / name} holds no images.",
                    why=f"Files ending in {', '.join(EXTENSIONS)} are images; there is none.",
                    fix="Put images there, or remove the folder.",
                )
            self.names += [f"{name}/{image}" for image in found]
            labels += [label] * len(found)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        """See `Source`: the path within the folder."""
        return self.names[index]

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """See `Source`. Nothing is drawn.

        Raises:
            DyditError: for a file that is not a readable image; the file is named.
        """
        return torch.stack([self._read(self.folder / self.names[index]) for index in indices])

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.batch([index])[0], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "kind": "image folder",
            "path": str(self.folder),
            "samples": len(self),
            "classes": self.classes,
        }

    def _read(self, path: Path) -> Tensor:
        return as_pixels(centre_crop(opened_image(path, self.mode), self.size))


def opened_image(path: Path, mode: str) -> Image.Image:
    """Read an image file as grey (``L``) or colour (``RGB``).

    Raises:
        DyditError: if it is not a readable image; the file is named.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise DyditError(
            f"The image {path} cannot be read.",
            why=f"{type(error).__name__}: {error}.",
            fix="Replace the file or remove it from the folder.",
        ) from error


def as_pixels(image: Image.Image) -> Tensor:
    """A grey or RGB image as (C, h, w) fp32 in [-1, 1]."""
    pixels = np.array(image)
    channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(channels)).float().div_(127.5).sub_(1.0)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut the middle, as ADM's preprocessing does.

    Halving with a box filter first and finishing with a bicubic one keeps large images free of aliasing
    (Dhariwal and Nichol, guided-diffusion).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize(
        (round(image.width * factor), round(image.height * factor)), resample=Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def unpadded_numbers(names: Sequence[str]) -> bool:
    """Whether sorting the class names as text differs from sorting them as numbers (10 before 2)."""
    return all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names)


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _images_below(folder: Path) -> list[str]:
    """Paths of the images within ``folder``, sorted. Names alone decide: a million files are not asked for
    their type.
    """
    found = []
    for below, _, files in os.walk(folder, followlinks=True):
        inside = Path(below).relative_to(folder)
        found += [(inside / name).as_posix() for name in files if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _class_folders(folder: Path) -> list[str]:
    entries = [path for path in folder.iterdir() if _visible(path)]
    classes = sorted(path.name for path in entries if path.is_dir())
    if classes:
        return classes
    if not entries:
        raise DyditError(
            f"The data folder {folder} is empty.",
            why="Training needs images in one folder a class, IDX files, or a file of latents.",
            fix="Give the folder that holds the data.",
        )
    if any(_is_image(path.name) for path in entries):
        raise DyditError(
            f"The images in {folder} do not lie in class folders.",
            why="The label of an image is its folder: FOLDER/<class>/<image>.",
            fix="Move the images into one sub-folder a class.",
        )
    raise DyditError(
        f"The data folder {folder} holds no images.",
        why="It has neither class folders with images nor IDX files (train-images-idx3-ubyte.gz and so on).",
        fix="Give the folder that holds the data, or the path of the .npz, .npy or .safetensors file itself.",
    )
