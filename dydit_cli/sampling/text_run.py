"""What a run of a text-to-image model has beside that of a class-conditional one: conditions, sizes, a schedule, a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dydit_cli.data.cached_text import TextGeometry
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.flux_geometry import pipeline_for
from dydit_cli.pipelines.autoencoder import Autoencoder, open_autoencoder
from dydit_cli.pipelines.folder import PipelineFolder
from dydit_cli.sampling.prompts import TextRequest, conditions_for

PACK = 2
"""Latent pixels on a side of a token."""
REDUCTION = 8
"""Of the published autoencoders, for runs without one."""


def refuse_texts(request: TextRequest, height: int | None, width: int | None) -> None:
    """See that nothing of a text-to-image run is asked of another model.

    Raises:
        DyditError: If it is.
    """
    if request.empty and height is None and width is None:
        return
    raise DyditError(
        "The model takes no prompts.",
        why="It is conditioned on classes, and has one resolution.",
        fix="Leave out --prompt, --prompts, --cache, --pipeline, --height and --width; --classes chooses.",
    )


def refuse_companions(config: Mapping[str, Any]) -> None:
    """See that a model of texts begins with noise alone.

    Raises:
        DyditError: If it takes latents beside the sample, of a picture to fill or of edges to follow.
    """
    taken = int(config["in_channels"])
    predicted = int(config.get("out_channels") or taken)
    if taken == predicted:
        return
    raise DyditError(
        "The model takes latents beside the sample.",
        why="It is made for filling or following images, which need one to begin with.",
        fix=f"Export it as a pipeline and run that with diffusers' {pipeline_for(taken, predicted)}, or pass "
        "dydit_cli.load_model(FOLDER) as the transformer of one that you have.",
    )


def text_arguments(
    model: DynamicModel,
    request: TextRequest,
    pipeline: PipelineFolder | None,
    vae: str | Path | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], Autoencoder | None, tuple[str, ...]]:
    """Prepare a run: further arguments of `generate`, what decodes its latents, and its prompts.

    Raises:
        DyditError: If conditions, sizes or autoencoder do not fit the model.
    """
    geometry = model.geometry
    if not isinstance(geometry, TextGeometry):
        raise TypeError(f"{type(geometry).__name__} is no geometry of a model of texts")
    found = conditions_for(request, geometry, guidance=guidance, device=device, dtype=dtype)
    decoder = None
    if vae is not None or pipeline is not None:
        decoder = open_autoencoder(vae or pipeline.part("vae"), device)  # type: ignore[union-attr]
        if decoder.channels != geometry.in_channels:
            raise DyditError(
                f"The autoencoder at {decoder.folder} does not fit the model.",
                why=f"It decodes latents of {decoder.channels} channels; the model makes {geometry.in_channels}.",
                fix="Pass the pipeline that the model belongs to.",
            )
    arguments: dict[str, Any] = {"conditions": found.condition}
    if height is not None or width is not None:
        reduction = decoder.reduction if decoder is not None else REDUCTION
        whole = geometry.sample_size * reduction
        arguments["size"] = _latent_size(height or whole, width or whole, reduction)
    if pipeline is not None and (pipeline.path / "scheduler").is_dir():
        arguments["schedule"] = pipeline.config("scheduler", "scheduler_config.json")
    return arguments, decoder, found.prompts


def strength_of(arguments: dict[str, Any]) -> float | None:
    """The guidance of a run, of models that take one."""
    strengths = arguments["conditions"].guidance
    return None if strengths is None else float(strengths[0])


def _latent_size(height: int, width: int, reduction: int) -> tuple[int, int]:
    multiple = reduction * PACK
    if height % multiple or width % multiple:
        raise DyditError(
            f"Images of {width}x{height} pixels are not possible.",
            why=f"The autoencoder reduces a side {reduction} times and tokens pair the rest: sides are multiples of {multiple}.",
            fix=f"Pass --width {max(1, width // multiple) * multiple} and --height {max(1, height // multiple) * multiple}.",
        )
    return height // reduction, width // reduction
