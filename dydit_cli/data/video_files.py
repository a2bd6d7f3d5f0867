"""The frames of a clip out of a video file: exact, and without decoding what lies far before or after it.

Containers cannot be trusted about their number of frames (WebM and Matroska do not say it), so the packets are listed
first, which costs reading but no decoding; their times number the frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dydit_cli.data.clips import ClipShape
from dydit_cli.errors import DyditError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

EXTENSIONS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".gif",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ogv",
)

INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Formats, by FFmpeg's names, in which seeking lands on the key frame asked for or before it; others are decoded from
their beginning.
"""


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a video are shown.

    Attributes:
        times: One a frame, ascending; empty where the file does not tell every frame's own.
        keys: Those from which decoding can begin.
        length: Number of frames.
    """

    times: tuple[int, ...]
    keys: tuple[int, ...]
    length: int


def read_clip(path: Path, clip: ClipShape, moment: float | None) -> list[Image.Image]:
    """Decode the frames of one clip.

    Args:
        path: The video file.
        clip: Which frames.
        moment: Where the clip begins; see `ClipShape.within`.

    Returns:
        ``clip.frames`` RGB images.

    Raises:
        DyditError: for a file that cannot be decoded or is too short; the file is named.
    """
    with _opened(path) as (container, stream):
        timeline = _timeline(container, stream)
    wanted = clip.within(timeline.length, moment, path)
    images: list[Image.Image] = []
    # Opened again rather than sought back: not every format can go back to its beginning.
    with _opened(path) as (container, stream):
        for place, frame in _frames_from(container, stream, timeline, wanted.start):
            # More than one where a packet held no picture of its own: the next picture stands for it.
            while len(images) < clip.frames and place >= wanted[len(images)]:
                if frame.is_corrupt:
                    raise _unreadable(path, f"its frame {place} is damaged")
                images.append(frame.to_image())
            if len(images) == clip.frames:
                return images
    raise _unreadable(path, f"it lists {timeline.length} frames but ends before frame {wanted[len(images)]}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    import av

    try:
        # "file:" because a name with a colon would be taken for the address of a protocol.
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            if not container.streams.video:
                raise _unreadable(path, "it holds no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise _unreadable(path, f"{type(error).__name__}: {said}") from error


def _timeline(container: InputContainer, stream: VideoStream) -> _Timeline:
    # A file's last packet is an empty one that stands for its end.
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    timed = len(set(times)) == len(packets)
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
    return _Timeline(tuple(times) if timed else (), tuple(keys), len(packets))


def _frames_from(
    container: InputContainer, stream: VideoStream, timeline: _Timeline, first: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their numbers, beginning at frame ``first`` or before it."""
    if not timeline.times:
        yield from enumerate(container.decode(stream))
        return
    number = {time: place for place, time in enumerate(timeline.times)}
    keys = [key for key in timeline.keys if key <= timeline.times[first]]
    if keys and keys[-1] > timeline.times[0] and container.format.name in INDEXED:
        container.seek(keys[-1], stream=stream)
    for frame in container.decode(stream):
        if frame.pts in number:
            yield number[frame.pts], frame


def _unreadable(path: Path, why: str) -> DyditError:
    return DyditError(
        f"The video {path} cannot be read.",
        why=f"{why[:1].upper()}{why[1:]}.",
        fix="Replace the file or remove it from the folder.",
    )
