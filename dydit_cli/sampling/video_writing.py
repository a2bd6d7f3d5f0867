"""The files of a sampling run of a video model, written while it runs: MP4, GIF, frames, grids and ``samples.npz``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.sampling.decoding import Decoder, to_uint8
from dydit_cli.sampling.streaming import ArrayStream, npz_stream
from dydit_cli.sampling.video_files import MAX_RATE, save_frames, save_gif, save_mp4
from dydit_cli.sampling.writing import image_grid, save_png

FORMATS = ("mp4", "gif", "frames", "grid")
DEFAULT_FORMATS = ("mp4", "gif", "grid")
DEFAULT_FPS = 8.0

GRID_VIDEOS = 16
"""Videos that ``grid.gif`` plays at once."""
SHEET_VIDEOS = 8
"""Rows of ``grid.png``."""
GRID_SIDE = 64
"""Smallest side of a video in the grids, in pixels: smaller ones are enlarged, for motion is lost in a stamp."""


def check_video_formats(formats: Sequence[str], fps: float) -> None:
    """Refuse what `VideoWriter` could not write, before anything is computed.

    Raises:
        DyditError: for an unknown format, or a rate that is not possible.
    """
    for name in formats:
        if name not in FORMATS:
            raise DyditError(
                f"'{name}' is not a format of videos.",
                why=f"{did_you_mean(name, FORMATS) or 'These are: ' + ', '.join(FORMATS) + '.'}".capitalize(),
                fix=f"Pass some of {','.join(FORMATS)}.",
            )
    gifs = {"gif", "grid"} & set(formats)
    highest = MAX_RATE if gifs else math.inf
    if not 0 < fps <= highest or not math.isfinite(fps):
        raise DyditError(
            f"{fps:g} frames a second are not possible.",
            why=f"A GIF shows at most {MAX_RATE:g}." if gifs and fps > highest else "It is a number above 0.",
            fix=f"Pass --fps {DEFAULT_FPS:g}, say" + (", or --video-formats mp4,frames." if gifs else "."),
        )


class VideoWriter:
    """Writes batches of videos into a folder; use it in a ``with``, as `SampleWriter`.

    ``mp4`` and ``gif`` become ``videos/000000.mp4`` and so on, ``frames`` ``frames/000000/000.png``, ``grid`` two pictures
    of the first videos: ``grid.gif`` plays them side by side, ``grid.png`` shows a video a row and a frame a column.
    ``samples.npz`` holds all of them, exactly (``arr_0``, uint8 N x F x H x W x 3; grey is repeated).

    Args:
        folder: Exists.
        num_videos: How many will come.
        decoder: For latents, which are decoded frame by frame.
        formats: Some of `FORMATS`.
        fps: Frames a second of MP4 and GIF.

    Raises:
        DyditError: as `check_video_formats`.
    """

    def __init__(
        self,
        folder: Path,
        num_videos: int,
        decoder: Decoder | None = None,
        *,
        formats: Sequence[str] = DEFAULT_FORMATS,
        fps: float = DEFAULT_FPS,
    ) -> None:
        check_video_formats(formats, fps)
        self._folder = folder
        self._num_videos = num_videos
        self._decoder = decoder
        self._formats = frozenset(formats)
        self._fps = fps
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
        """Close the files and, after a whole run, draw the grids."""
        self._open_files.__exit__(kind, error, trace)
        if error is None and self._first:
            save_gif(playing_grid(np.stack(self._first)), self._folder / "grid.gif", self._fps)
            save_png(frame_sheet(np.stack(self._first[:SHEET_VIDEOS])), self._folder / "grid.png")

    @property
    def files(self) -> list[str]:
        """What a whole run leaves, relative to the folder."""
        found = []
        if self._formats & {"mp4", "gif"}:
            found.append("videos/")
        if "frames" in self._formats:
            found.append("frames/")
        if "grid" in self._formats:
            found += ["grid.gif", "grid.png"]
        return [*found, "samples.npz"]

    def write(self, samples: Tensor) -> None:
        """Append a batch (B, F, C, h, w), pixels, or latents for the decoder."""
        self.append(self.finished(samples))

    def finished(self, samples: Tensor) -> NDArray:
        """A batch as it is to be stored, (B, F, H, W, C) bytes; any process can do that."""
        frames = samples.flatten(0, 1)
        pixels = self._decoder.decode(frames) if self._decoder is not None else frames
        return as_bytes(pixels.unflatten(0, tuple(samples.shape[:2])))

    def append(self, videos: NDArray) -> None:
        """Append what `finished` gave."""
        colour = videos if videos.shape[-1] == 3 else videos.repeat(3, axis=-1)
        if self._stream is None:
            self._stream = self._begin(colour.shape[1:])
        self._stream.write(colour)
        if "grid" in self._formats:
            self._first.extend(videos[: GRID_VIDEOS - len(self._first)])
        for video in videos:
            self._save(video, f"{self._written:06d}")
            self._written += 1

    def _begin(self, shape: tuple[int, ...]) -> ArrayStream:
        if self._formats & {"mp4", "gif"}:
            (self._folder / "videos").mkdir()
        stream = npz_stream(self._folder / "samples.npz", (self._num_videos, *shape), np.dtype(np.uint8))
        return self._open_files.enter_context(stream)

    def _save(self, video: NDArray, name: str) -> None:
        if "mp4" in self._formats:
            save_mp4(video, self._folder / "videos" / f"{name}.mp4", self._fps)
        if "gif" in self._formats:
            save_gif(video, self._folder / "videos" / f"{name}.gif", self._fps)
        if "frames" in self._formats:
            save_frames(video, self._folder / "frames" / name)


def as_bytes(pixels: Tensor) -> NDArray:
    """(B, F, C, H, W) in [-1, 1] -> (B, F, H, W, C) bytes, rounded as those of images."""
    return to_uint8(pixels.flatten(0, 1)).unflatten(0, tuple(pixels.shape[:2])).numpy()


def picture_of(samples: Tensor) -> NDArray:
    """One picture (height, width, C) of images (B, C, H, W), as a grid, or of videos (B, F, C, H, W), as a sheet of frames."""
    return image_grid(to_uint8(samples).numpy()) if samples.ndim == 4 else frame_sheet(as_bytes(samples))


def playing_grid(videos: NDArray) -> NDArray:
    """Lay out videos (N, F, H, W, C) of bytes side by side, frame by frame: (F, height, width, C); small ones enlarged."""
    large = _enlarged(videos)
    return np.stack([image_grid(large[:, frame]) for frame in range(large.shape[1])])


def frame_sheet(videos: NDArray) -> NDArray:
    """Lay out videos (N, F, H, W, C) of bytes as one picture (height, width, C), a video a row and a frame a column; small ones
    enlarged.
    """
    large = _enlarged(videos)
    return image_grid(large.reshape(-1, *large.shape[2:]), columns=large.shape[1])


def _enlarged(videos: NDArray) -> NDArray:
    # Whole factors and copied pixels, because a smooth enlargement would hide what the model draws.
    factor = max(1, math.ceil(GRID_SIDE / min(videos.shape[2:4])))
    return videos.repeat(factor, axis=2).repeat(factor, axis=3)
