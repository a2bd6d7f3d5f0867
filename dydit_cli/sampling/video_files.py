"""One video as a file: MP4 for players, GIF for pages, frames for editors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dydit_cli.sampling.writing import save_png

if TYPE_CHECKING:
    from av.video.stream import VideoStream

GIF_TICK = 0.01
"""GIFs count time in hundredths of a second."""
GIF_LEAST_TICKS = 2
"""Browsers slow down what is faster."""
MAX_RATE = GIF_TICK**-1 / GIF_LEAST_TICKS
"""Frames a second that a GIF can show."""


def save_mp4(frames: NDArray, path: Path, fps: float) -> None:
    """Save (F, H, W, 1 or 3) bytes as MP4: H.264 where PyAV has an encoder of it, else MPEG-4 part 2.

    Colours are stored at half the resolution (yuv420p), which all players show. It wants even sides: an odd one is
    extended by a copy of its last row or column.
    """
    import av

    colour = frames.repeat(3, axis=-1) if frames.shape[-1] == 1 else frames
    height, width = colour.shape[1:3]
    even = np.pad(colour, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # The format is named because the path may be a temporary one.
    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        # PyAV's annotations leave open what kind of stream a codec named at run time makes.
        stream = cast("VideoStream", container.add_stream(video_codec(), rate=rate))
        stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], "yuv420p"
        # Almost without loss: what is seen should be the model's, not the encoder's.
        if stream.codec_context.name == "libx264":
            stream.options = {"crf": "10", "preset": "medium"}
        else:
            stream.codec_context.bit_rate = math.ceil(even[0].size * fps * 2)
        for frame in even:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def video_codec() -> str:
    """The encoder of MP4 files that this build of PyAV has."""
    import av

    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def save_gif(frames: NDArray, path: Path, fps: float) -> None:
    """Save (F, H, W, 1 or 3) bytes as a GIF that repeats: grey exactly, colour with one palette for all frames.

    Frames that do not differ are stored as one that lasts longer. The rate is rounded to what a GIF can say.
    """
    pictures = _in_one_palette(frames)
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=round(max(1 / (fps * GIF_TICK), GIF_LEAST_TICKS)) * round(GIF_TICK * 1000),
        loop=0,
    )


def save_frames(frames: NDArray, folder: Path) -> None:
    """Save (F, H, W, 1 or 3) bytes as ``000.png`` and so on."""
    folder.mkdir(parents=True)
    digits = max(3, len(str(len(frames) - 1)))
    for index, frame in enumerate(frames):
        save_png(frame, folder / f"{index:0{digits}d}.png")


def _in_one_palette(frames: NDArray) -> Sequence[Image.Image]:
    if frames.shape[-1] == 1:
        return [Image.fromarray(frame[..., 0]) for frame in frames]
    # One palette, and no dithering: colours that change from frame to frame are seen as flicker.
    palette = Image.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(256)
    return [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
