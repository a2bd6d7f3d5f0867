"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dydit_cli.evaluation.inputs.model import SamplingSettings

AUTO = "auto"


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, and how.

    Attributes:
        sampling: For models.
        limit: Take the first so many images of a folder or archive; all if None.
        videos: Folders in a folder are videos, not classes.
        reference: A path, ``fashion-mnist``, or None: that of the Fashion-MNIST network, and none for another.
        extractor: ``fashion-mnist``, the path of an Inception weights' file, or ``auto``: the former where it can judge the images.
        resize: See `open_inception`.
        against: A static model, or images to pair with.
        yardstick_images: Pairs of each yardstick, at most; 0 measures none.
        lpips: Folder of its weights. clip: Folder of a CLIP model. prompts: File of prompts for it.
        processes: Processes that share sampling and features, of which this is one.
        statistics: Also write the moments of the samples' features.
        fail_if: Conditions under which the run fails.
    """

    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    limit: int | None = None
    videos: bool = False
    reference: str | None = None
    extractor: str = AUTO
    resize: str = AUTO
    against: str | None = None
    yardstick_images: int = 256
    lpips: str | None = None
    clip: str | None = None
    prompts: str | None = None
    processes: int = 1
    statistics: bool = False
    fail_if: Sequence[str] = ()
