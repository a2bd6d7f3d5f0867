"""A folder of videos, as files or as folders of frames, from which clips of the model's length are read when needed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.data import video_files
from dydit_cli.data.clips import ClipShape, moment_of
from dydit_cli.data.folder import EXTENSIONS as IMAGE_EXTENSIONS
from dydit_cli.data.folder import as_pixels, centre_crop, opened_image
from dydit_cli.data.source import Draw, VideoGeometry
from dydit_cli.errors import DyditError

FEW_FORMATS = ", ".join(video_files.EXTENSIONS[:7])


class VideoFolder:
    """Videos in class folders, or anywhere below the folder for a model without classes.

    A video is a file, or a folder of images, which are its frames in natural order (2 before 10). Images beside video
    files are taken for their previews and left alone.

    Args:
        folder: The folder of class folders, or of videos.
        geometry: The model's input: frames are cropped to its size and converted to its channels.
        frame_interval: Distance between the frames of a clip; 1 takes consecutive ones.

    Raises:
        DyditError: for no videos, a class without videos, or more classes than the model has.
    """

    def __init__(self, folder: Path, geometry: VideoGeometry, frame_interval: int = 1) -> None:
        self.folder = folder
        self.size = geometry.sample_size
        self.mode = "L" if geometry.in_channels == 1 else "RGB"
        self.clip = ClipShape(geometry.num_frames, frame_interval)
        # One class is as good as none: every sample has label 0, and the folders are the user's own order.
        conditional = geometry.num_classes > 1
        self.classes = _class_folders(folder, geometry.num_classes) if conditional else []
        self.names: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes or ["."]):
            found = _videos_below(folder / name)
            if not found:
                raise _no_videos(folder / name, conditional)
            self.names += [(Path(name) / video).as_posix() for video in found]
            labels += [label] * len(found)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        """See `Source`: the path within the folder, so that whole videos are held out."""
        return self.names[index]

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """(b, F, C, size, size); see `Source`. ``draw`` chooses where a clip begins; without it, it is the middle one.

        Raises:
            DyditError: for a video that cannot be read or is too short; its file is named.
        """
        return torch.stack(
            [
                self._read(self.folder / self.names[index], moment_of(draw, k))
                for k, index in enumerate(indices)
            ]
        )

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.batch([index])[0], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "kind": "video folder",
            "path": str(self.folder),
            "samples": len(self),
            "classes": self.classes,
            "frames": self.clip.frames,
            "frame_interval": self.clip.interval,
        }

    def _read(self, path: Path, moment: float | None) -> Tensor:
        if path.is_dir():
            files = _frames_in(path)
            images = [
                opened_image(path / files[place], self.mode)
                for place in self.clip.within(len(files), moment, path)
            ]
        else:
            images = [image.convert(self.mode) for image in video_files.read_clip(path, self.clip, moment)]
        return torch.stack([as_pixels(centre_crop(image, self.size)) for image in images])


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers inside names by value: frame2 before frame10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _is(name: str, extensions: tuple[str, ...]) -> bool:
    return not name.startswith(".") and name.lower().endswith(extensions)


def _frames_in(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DyditError(
            f"The frames in {folder} cannot be read.",
            why=f"{error}.",
            fix="Check that the folder is still there, or remove the video.",
        ) from error
    return sorted((name for name in names if _is(name, IMAGE_EXTENSIONS)), key=natural)


def _videos_below(folder: Path) -> list[str]:
    """Paths of the video files and the folders of frames within ``folder``, sorted.

    Images in ``folder`` itself are nobody's frames: it is a collection, not a video.
    """
    found = []
    for below, _, files in os.walk(folder, followlinks=True):
        inside = Path(below).relative_to(folder)
        videos = [(inside / name).as_posix() for name in files if _is(name, video_files.EXTENSIONS)]
        is_frames = not videos and any(_is(name, IMAGE_EXTENSIONS) for name in files)
        found += [inside.as_posix()] if is_frames and inside != Path() else videos
    return sorted(found)


def _class_folders(folder: Path, num_classes: int) -> list[str]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    classes = sorted(path.name for path in visible if path.is_dir())
    if len(classes) > num_classes:
        raise DyditError(
            f"{folder} has {len(classes)} class folders, the model has {num_classes} classes.",
            why="Each class folder needs a label of its own.",
            fix="Remove class folders, or use a model with as many classes.",
        )
    if not classes and any(_is(path.name, video_files.EXTENSIONS) for path in visible):
        raise DyditError(
            f"The videos in {folder} do not lie in class folders.",
            why=f"The model has {num_classes} classes, and the label of a video is its folder: FOLDER/<class>/<video>.",
            fix="Move the videos into one sub-folder a class, or use a model without classes.",
        )
    if not classes:
        raise _no_videos(folder, conditional=False)
    return classes


def _no_videos(folder: Path, conditional: bool) -> DyditError:
    what = f"The class folder {folder}" if conditional else f"The data folder {folder}"
    if any(_is(name, IMAGE_EXTENSIONS) for name in os.listdir(folder)):
        return DyditError(
            f"{what} holds images, but no video.",
            why="The model takes videos; a video is a file, or a folder of its own with its frames as images.",
            fix=f"Put the frames of each video into a folder of their own, as {folder.name or 'FOLDER'}/<video>/0001.png.",
        )
    return DyditError(
        f"{what} holds no videos.",
        why=f"Files ending in {FEW_FORMATS} and the like are videos, and so are folders of images; there is none.",
        fix="Put videos there, or "
        + ("remove the folder." if conditional else "give the folder that holds them."),
    )
