"""The files of a sampling run, written while it runs: PNG images, a grid, ADM's ``samples.npz``, or latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dydit_cli.sampling.decoding import Decoder, makes_pixels, to_uint8
from dydit_cli.sampling.streaming import ArrayStream, npz_stream, safetensors_stream

GRID_IMAGES = 64
PADDING = 2


class SampleWriter:
    """Writes batches into a folder; use it in a ``with``.

    Pixels, or latents with a decoder, become ``images/000000.png``, ``grid.png`` (the first 64) and ``samples.npz`` (``arr_0``,
    uint8 N x H x W x 3, the archive of OpenAI's ADM evaluation; grey is repeated). Latents alone become ``latents.safetensors``
    at the model's scale, with their labels, as `dydit finetune` reads them.

    Args:
        folder: Exists.
        num_images: How many will come.
        labels: Their classes, (num_images,).
        decoder: For latents.
    """

    def __init__(
        self, folder: Path, num_images: int, labels: Sequence[int], decoder: Decoder | None = None
    ) -> None:
        self._folder = folder
        self._num_images = num_images
        self._labels = np.asarray(labels, np.int64)
        self._decoder = decoder
        self._open_files = ExitStack()
        self._stream: ArrayStream | None = None
        self._first: list[NDArray] = []
        self._written = 0

    def __enter__(self) -> Self:
        """Nothing is opened before the first batch, whose shape is needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and, after a whole run, draw the grid."""
        self._open_files.__exit__(kind, error, trace)
        if error is None and self._first:
            save_png(image_grid(np.stack(self._first)), self._folder / "grid.png")

    @property
    def files(self) -> list[str]:
        """What a whole run leaves, relative to the folder."""
        return ["images/", "grid.png", "samples.npz"] if self._first else ["latents.safetensors"]

    def write(self, samples: Tensor) -> None:
        """Append a batch (B, C, h, w), pixels or latents; latents of videos, (B, F, C, h, w), too."""
        self.append(self.finished(samples))

    def finished(self, samples: Tensor) -> NDArray:
        """A batch as it is to be stored: (B, H, W, C) bytes, or fp32 latents; any process can do that."""
        if self._decoder is not None:
            samples = self._decoder.decode(samples)
        elif not makes_pixels(samples.shape[-3]):
            return samples.float().cpu().numpy()
        return to_uint8(samples).numpy()

    def append(self, batch: NDArray) -> None:
        """Append what `finished` gave."""
        if batch.dtype == np.uint8:
            self._write_images(batch)
        else:
            self._write_latents(batch)

    def _write_images(self, images: NDArray) -> None:
        colour = images if images.shape[-1] == 3 else images.repeat(3, axis=-1)
        if self._stream is None:
            (self._folder / "images").mkdir()
            shape = (self._num_images, *colour.shape[1:])
            stream = npz_stream(self._folder / "samples.npz", shape, np.dtype(np.uint8))
            self._stream = self._open_files.enter_context(stream)
        self._stream.write(colour)
        self._first.extend(images[: GRID_IMAGES - len(self._first)])
        for image in images:
            save_png(image, self._folder / "images" / f"{self._written:06d}.png")
            self._written += 1

    def _write_latents(self, latents: NDArray) -> None:
        if self._stream is None:
            # The samples are at the model's scale already: whoever reads them multiplies by 1, and a VAE's user divides.
            stream = safetensors_stream(
                self._folder / "latents.safetensors",
                "latents",
                (self._num_images, *latents.shape[1:]),
                self._labels,
                {"scale": "1.0", "format": "pt"},
            )
            self._stream = self._open_files.enter_context(stream)
        self._stream.write(latents)


def image_grid(images: NDArray, columns: int | None = None, padding: int = PADDING) -> NDArray:
    """Lay out images (N, H, W, C) of bytes row by row on white, near-square unless ``columns`` is given."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8
    )
    for index, image in enumerate(images):
        top = padding + (index // columns) * (height + padding)
        left = padding + (index % columns) * (width + padding)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_png(image: NDArray, path: Path) -> None:
    """Save (H, W, 1 or 3) bytes as PNG."""
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG")
