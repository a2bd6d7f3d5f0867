"""What a sampling run asks for, held against the model's configuration before weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import model_config
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import require
from dydit_cli.families.registry import class_named, family_named
from dydit_cli.pipelines.folder import PipelineFolder
from dydit_cli.sampling.decoding import vae_config
from dydit_cli.sampling.generate import GenerationSettings, check_settings
from dydit_cli.sampling.prompts import TextRequest
from dydit_cli.sampling.text_run import refuse_companions, refuse_texts
from dydit_cli.sampling.video_writing import check_video_formats

TEXTS = "rectified-flow"
"""The objective of the families that draw prompts."""


@dataclass(frozen=True)
class CheckedRun:
    """A run that fits its model.

    Attributes:
        config: The model's configuration.
        model_class: What it is loaded as to be sampled.
        settings: What to generate.
        texts: Whether the model draws prompts.
        parts: The pipeline whose encoders read them, if one is given.
    """

    config: Mapping[str, Any]
    model_class: type[DynamicModel]
    settings: GenerationSettings
    texts: bool
    parts: PipelineFolder | None

    @property
    def channels(self) -> int:
        """Channels of a sample of the model."""
        return int(self.config["in_channels"])


def check_run(
    model: str | Path,
    request: Mapping[str, Any],
    text: TextRequest,
    *,
    vae: str | Path | None,
    height: int | None,
    width: int | None,
    video_formats: Sequence[str],
    fps: float,
) -> CheckedRun:
    """Check all that does not need weights.

    Args:
        model: Folder of a model.
        request: Arguments of `check_settings`.
        text: Where prompts come from.
        vae, height, width, video_formats, fps: As in `dydit_cli.sampling.run.sample`.

    Raises:
        DyditError: For what cannot be.
    """
    config = model_config(model)
    stored = class_named(config["_class_name"])
    if stored is None:
        raise TypeError(config["_class_name"])
    family = family_named(stored.family)
    require(family, "dydit sample")
    texts = family.objective == TEXTS
    settings = check_settings(family.objective, 0 if texts else int(config["num_classes"]), **request)
    parts = None
    if texts:
        refuse_companions(config)
        parts = text.check()
    else:
        refuse_texts(text, height, width)
        if vae is not None:
            vae_config(Path(vae).expanduser(), int(config["in_channels"]))
    check_video_formats(video_formats, fps)
    return CheckedRun(config, family.model_class, settings, texts, parts)
