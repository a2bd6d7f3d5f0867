"""What the tests of video data share: a model's shape, pictures that move, and files of them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class VideoShape:
    """The part of a video model's geometry that data reads."""

    sample_size: int = 16
    in_channels: int = 3
    num_classes: int = 2
    num_frames: int = 4


def drifting(frames: int, side: int, offset: int = 0) -> torch.Tensor:
    """(F, 3, side, side) bytes: a soft spot that moves to the right, brighter from frame to frame."""
    place = torch.arange(side) / side
    pictures = []
    for frame in range(frames):
        centre = (offset / side + frame / (2 * frames)) % 1.0
        spot = (
            torch.exp(-(((place - centre) * 4) ** 2))[None, :]
            * torch.exp(-(((place - 0.5) * 3) ** 2))[:, None]
        )
        base = 40 + 120 * frame / frames
        pictures.append(torch.stack([base + 80 * spot, base - 30 * spot, base + 20 * spot]))
    return torch.stack(pictures).round().clamp(0, 255).to(torch.uint8)


def numbered(frames: int, height: int = 32, width: int = 48, step: int = 8) -> np.ndarray:
    """(F, height, width, 3) bytes: frame k is ``step`` * k everywhere, so that a value tells its frame."""
    return np.stack([np.full((height, width, 3), step * k, np.uint8) for k in range(frames)])


def save_video(path: Path, frames: np.ndarray, codec: str = "libx264", keyframes: int = 12) -> Path:
    """Encode (F, H, W, 3) bytes, without loss where the codec can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": "1"} if codec == "libx264" else {"qscale": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(8), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.gop_size = keyframes
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def save_frames(folder: Path, frames: np.ndarray, pattern: str = "frame{}.png") -> Path:
    """Write frames as images that only a natural order puts right (2 before 10)."""
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / pattern.format(index))
    return folder
