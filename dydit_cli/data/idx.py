"""IDX files, the format of MNIST and Fashion-MNIST, gzipped or not, under their original names.

Source: http://yann.lecun.com/exdb/mnist and https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dydit_cli.data.images import ArrayImages
from dydit_cli.data.source import SampleGeometry, checked_labels
from dydit_cli.errors import DyditError

FULL_FASHION_MNIST_LABELS = "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
"""SHA-256 of the 60,000 training labels' IDX file, unpacked: tells Fashion-MNIST from MNIST wherever the
folder lies.
"""

MAX_PADDING = 4
"""Largest border that counts as padding (28x28 in 32x32 needs 2); a larger difference is a wrong
resolution.
"""


@dataclass(frozen=True)
class IdxFolder:
    """The parts of an IDX folder: training images and, if there are t10k files, held-out images."""

    train: ArrayImages
    held_out: ArrayImages | None
    is_fashion_mnist: bool


def is_idx_folder(folder: Path) -> bool:
    """Whether the folder holds an IDX file of the usual names."""
    return any(
        _find(folder, part, kind) is not None for part in ("train", "t10k") for kind in ("images", "labels")
    )


def read_idx_folder(folder: Path, geometry: SampleGeometry) -> IdxFolder:
    """Read the images and labels of an IDX folder.

    Raises:
        DyditError: for a missing, truncated or foreign file, and for images that do not fit the model.
    """
    train = _read_part(folder, "train", geometry)
    has_held_out = _find(folder, "t10k", "images") is not None or _find(folder, "t10k", "labels") is not None
    held_out = _read_part(folder, "t10k", geometry) if has_held_out else None
    labels = _find(folder, "train", "labels")
    digest = hashlib.sha256(_unpack(labels)).hexdigest() if labels is not None else ""
    return IdxFolder(train, held_out, digest == FULL_FASHION_MNIST_LABELS)


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read one IDX file of bytes with the given number of dimensions.

    Raises:
        DyditError: if it is not such a file, or shorter or longer than its header says.
    """
    data = _unpack(path)
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes([0, 0, 8, dimensions]):
        raise DyditError(
            f"{path} is not an IDX file of {dimensions} dimension(s).",
            why=f"It begins with {data[:4].hex() or 'nothing'}; such a file begins with "
            f"000008{dimensions:02x}.",
            fix="Download the file again, or check that images and labels were not exchanged.",
        )
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    expected, found = int(np.prod(shape, dtype=object)), len(data) - header
    if found != expected:
        raise DyditError(
            f"{path} is {'truncated' if found < expected else 'longer than it says'}.",
            why=f"Its header names {' x '.join(map(str, shape))} = {expected} bytes, it holds {found}.",
            fix="Download the file again.",
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    dimensions = 3 if kind == "images" else 1
    for separator in ("-", "."):
        for suffix in (".gz", ""):
            path = folder / f"{part}-{kind}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _unpack(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.read()
        # Told by content: some mirrors keep the name and drop the compression.
        return gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DyditError(
            f"{path} is truncated or damaged.",
            why=f"It cannot be unpacked: {error}.",
            fix="Download the file again.",
        ) from error
    except OSError as error:
        raise DyditError(
            f"{path} cannot be read.",
            why=f"{error.strerror or error}.",
            fix="Check the path and its permissions.",
        ) from error


def _read_part(folder: Path, part: str, geometry: SampleGeometry) -> ArrayImages:
    found = {kind: _find(folder, part, kind) for kind in ("images", "labels")}
    paths = {kind: path for kind, path in found.items() if path is not None}
    if len(paths) < 2:
        missing = next(kind for kind, path in found.items() if path is None)
        dimensions = 3 if missing == "images" else 1
        raise DyditError(
            f"{folder} has no {part}-{missing}-idx{dimensions}-ubyte.gz.",
            why=f"An IDX data set has four files: train and t10k, images and labels; the {part} {missing} "
            "are missing.",
            fix="Put the missing file beside the others, under its original name.",
        )
    images, labels = read_idx(paths["images"], 3), read_idx(paths["labels"], 1)
    if geometry.in_channels != 1:
        raise DyditError(
            f"{folder} holds grey images, the model takes {geometry.in_channels} channels.",
            why="An IDX image has one channel.",
            fix="Use a model with one channel, or give the data as an image folder, which is converted.",
        )
    height, width = images.shape[1:]
    border = geometry.sample_size - height
    if height != width or border % 2 or not 0 <= border <= 2 * MAX_PADDING:
        raise DyditError(
            f"{folder} holds images of {height}x{width}, the model takes "
            f"{geometry.sample_size}x{geometry.sample_size}.",
            why=f"IDX images are padded by at most {MAX_PADDING} pixels a side (28x28 becomes 32x32) and "
            "never resized.",
            fix="Use a model of a fitting size, or give the data as an image folder, which is cropped and "
            "resized.",
        )
    checked = checked_labels(labels, len(images), geometry.num_classes, paths["labels"])
    return ArrayImages(images[:, None], checked, padding=border // 2, kind="idx", path=folder)


def labels_digest(labels: Tensor) -> str:
    """SHA-256 of labels, to tell whether a resumed run still sees its data."""
    return hashlib.sha256(labels.numpy().tobytes()).hexdigest()
