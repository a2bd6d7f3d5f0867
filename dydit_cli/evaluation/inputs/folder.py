"""Folders of images (flat, by class, or as `dydit sample` writes them) and folders of folders of frames."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dydit_cli.artifacts import model_config
from dydit_cli.artifacts.manifest import NAME as MANIFEST
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.inputs.archive import ArchiveImages, open_archive
from dydit_cli.evaluation.inputs.source import ImageBatch
from dydit_cli.processes.world import ALONE, World

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class FolderImages:
    """Image files in the order of their names. See `ImageSource`.

    Attributes:
        path: As the user gave it.
        groups: Files of an image (one), or of the frames of a video.
        frames: See `ImageSource`.
        labels: See `ImageSource`.
        facts: How they were made, from a manifest.
    """

    path: Path
    groups: tuple[tuple[Path, ...], ...]
    frames: int | None = None
    labels: list[int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """See `ImageSource`."""
        return "folder" if self.frames is None else "video folder"

    def __len__(self) -> int:
        return len(self.groups)

    def batches(self, size: int, world: World = ALONE) -> Iterator[ImageBatch]:
        """See `ImageSource`.

        Raises:
            DyditError: For a file that cannot be read, or is of another size than the first.
        """
        # Of the first image whatever the process, so that all refuse the same.
        first = tuple(read_image(self.groups[0][0]).shape) if self.groups else ()
        for start in range(world.rank * size, len(self.groups), world.size * size):
            read = []
            for group in self.groups[start : start + size]:
                pictures = [read_image(path) for path in group]
                for path, picture in zip(group, pictures, strict=True):
                    _check_shape(path, picture, first)
                read.append(pictures[0] if self.frames is None else torch.stack(pictures))
            yield ImageBatch(torch.stack(read))

    def describe(self) -> dict[str, Any]:
        """See `ImageSource`."""
        count = {"images": len(self)} if self.frames is None else {"videos": len(self), "frames": self.frames}
        return {"kind": self.kind, "path": str(self.path), **count, **self.facts}


def open_folder(folder: Path, limit: int | None = None, videos: bool = False) -> FolderImages | ArchiveImages:
    """Find the images of a folder.

    * What `dydit sample` writes: ``images/``, or ``samples.npz`` for videos; its manifest tells classes and settings.
    * Folders inside, if ``videos``: each is a video, its images the frames in the order of their numbers.
    * Image files directly inside: images.
    * Folders inside otherwise: class folders, labelled in the order of their names.

    Raises:
        DyditError: If there are none, or videos of different lengths.
    """
    sampled = folder / "images"
    if sampled.is_dir() and not videos:
        files = _files(sampled)
        facts, labels = _sampled(folder, len(files))
        return _checked(FolderImages(folder, _singles(files[:limit]), None, labels and labels[:limit], facts))
    if (folder / "samples.npz").is_file() and (folder / MANIFEST).is_file():
        archive = open_archive(folder / "samples.npz", limit)
        facts, labels = _sampled(folder, len(archive))
        return replace(archive, path=folder, facts=facts, labels=archive.labels or labels)
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and _files(child)]
    if videos:
        return _checked(_videos(folder, children[:limit]))
    if files := _files(folder):
        return FolderImages(folder, _singles(files[:limit]))
    files = [file for child in children for file in _files(child)]
    labels = [label for label, child in enumerate(children) for _ in _files(child)]
    return _checked(FolderImages(folder, _singles(files[:limit]), None, labels[:limit]))


def read_image(path: Path) -> Tensor:
    """(H, W, 1 or 3) bytes; palettes and transparency become colour.

    Raises:
        DyditError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            grey = image.mode in ("L", "1", "I;16", "I")
            pixels = np.array(image.convert("L" if grey else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DyditError(
            f"The image {path} cannot be read.",
            why=f"{type(error).__name__}: {error}.",
            fix="Replace the file or remove it from the folder.",
        ) from error
    return torch.from_numpy(pixels[..., None] if grey else pixels)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)


def _singles(files: list[Path]) -> tuple[tuple[Path, ...], ...]:
    return tuple((file,) for file in files)


def _videos(folder: Path, children: list[Path]) -> FolderImages:
    # By number: frame_10 follows frame_9.
    groups = tuple(tuple(sorted(_files(child), key=_number)) for child in children)
    lengths = sorted({len(group) for group in groups})
    if len(lengths) > 1:
        raise DyditError(
            f"The videos in {folder} are not equally long.",
            why=f"They have {lengths[0]} to {lengths[-1]} frames.",
            fix="Cut them to one length; distances over frames depend on it.",
        )
    return FolderImages(folder, groups, lengths[0] if lengths else 0)


def _number(file: Path) -> tuple[int, str]:
    """The last number of a name, or the name itself where there is none."""
    numbers = re.findall(r"\d+", file.stem)
    return (int(numbers[-1]) if numbers else 0, file.stem)


def _sampled(folder: Path, count: int) -> tuple[dict[str, Any], list[int] | None]:
    """How a folder of `dydit sample` was made, and its labels if the run named its classes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        settings = manifest["settings"]
        made = {
            key: settings.get(key)
            for key in ("seed", "steps", "guidance", "sampler", "execution", "keep_bias", "dtype")
        }
        results = manifest.get("results") or {}
        facts = {
            "made_by": made | {"steps": results.get("steps", made["steps"])},
            "model": (manifest.get("parent") or {}).get("path"),
            "weights_sha256": (manifest.get("parent") or {}).get("weights_sha256"),
            "trajectory_ratio": results.get("trajectory_ratio"),
        }
        classes = settings.get("classes") or _all_classes(facts["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, None
    labels = [int(classes[index % len(classes)]) for index in range(count)] if classes else None
    return facts, labels


def _all_classes(model: object) -> list[int] | None:
    """All labels of a model, which a run without classes used in turn; None if the model is not there any more."""
    try:
        return list(range(int(model_config(str(model))["num_classes"])))
    except (DyditError, KeyError, TypeError, ValueError):
        return None


def _checked(images: FolderImages) -> FolderImages:
    if not len(images):
        raise DyditError(
            f"{images.path} holds no images.",
            why=f"Files ending in {', '.join(EXTENSIONS)} are images; there are none in it or in its folders.",
            fix="Pass a folder of images, the --out of `dydit sample`, an .npz archive, or a model's folder.",
        )
    return images


def _check_shape(path: Path, picture: Tensor, first: tuple[int, ...]) -> None:
    if tuple(picture.shape) != first:
        height, width, channels = picture.shape
        raise DyditError(
            f"{path} is {height}x{width} with {channels} channel(s), the first image is {first[0]}x{first[1]} with {first[2]}.",
            why="Images of one evaluation have one size: nothing is cropped or resized before the network's own resizing.",
            fix="Bring all images to one size and mode.",
        )
