"""Which frames of a video a model sees: a clip of its number of frames, a fixed distance apart, from somewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dydit_cli.data.source import Draw
from dydit_cli.errors import DyditError


@dataclass(frozen=True)
class ClipShape:
    """The frames of a clip within its video.

    Attributes:
        frames: F, what the model takes.
        interval: Distance from one frame to the next, in frames of the video; 1 takes consecutive ones.
    """

    frames: int
    interval: int = 1

    @property
    def span(self) -> int:
        """Frames of the video from the first to the last of the clip, both included."""
        return (self.frames - 1) * self.interval + 1

    def within(self, length: int, moment: float | None, video: Path) -> range:
        """The numbers of the clip's frames in a video of ``length`` frames.

        Args:
            length: Frames of the video.
            moment: Where in [0, 1) among all possible starts the clip begins; None for the middle.
            video: Named in the error.

        Raises:
            DyditError: if the video is too short.
        """
        starts = length - self.span + 1
        if starts < 1:
            apart = f" {self.interval} frames apart ({self.span} from first to last)"
            raise DyditError(
                f"The video {video} has {length} frame{'s' if length != 1 else ''}.",
                why=f"The model takes clips of {self.frames} frames{apart if self.interval > 1 else ''}.",
                fix="Remove it"
                + (", lower frame_interval" if self.interval > 1 else "")
                + ", or give a longer one.",
            )
        start = (starts - 1) // 2 if moment is None else min(int(moment * starts), starts - 1)
        return range(start, start + self.span, self.interval)


def moment_of(draw: Draw | None, position: int) -> float | None:
    """Where the clip of a batch's sample begins, for `ClipShape.within`: drawn in training, the middle without ``draw``.

    The draw is standard normal, as latents need it; its distribution function makes it uniform.
    """
    if draw is None:
        return None
    return 0.5 * (1.0 + math.erf(float(torch.as_tensor(draw(position, ()))) / math.sqrt(2.0)))
