"""What a sampling run would read and make, without loading weights: `dydit sample --dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts.loading import model_folder
from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.devices import find_device
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import count_macs
from dydit_cli.pipelines.autoencoder import autoencoder_config
from dydit_cli.recipe.schema import SampleSection
from dydit_cli.sampling.checking import CheckedRun, check_run
from dydit_cli.sampling.decoding import makes_pixels
from dydit_cli.sampling.prompts import TextRequest

COLOURS = 3
LATENT = 4
"""Bytes of a number of a latent: they are written in fp32."""


@dataclass(frozen=True)
class SampleForesight:
    """What would be made.

    Attributes:
        model: Its folder. family: Its name. read_bytes: Of its weights.
        kind: ``images``, ``videos`` or ``latents``.
        samples: How many. batch: Of them in a forward.
        shape: Of one: channels last for pixels, (C, h, w) for latents, with frames first for videos.
        sampler: Its name. steps: None of one that chooses its own. guidance: Scale; None where the model takes none or has a default
            of its own. branches: Rows of the model a sample and call.
        static_gmacs: Of one call of the complete model for one sample, one branch, at its reference resolution.
        device: Where it would run.
        nbytes: Of what is written, at most.
    """

    model: str
    family: str
    read_bytes: int
    kind: str
    samples: int
    batch: int
    shape: tuple[int, ...]
    sampler: str
    steps: int | None
    guidance: float | None
    branches: int
    static_gmacs: float
    device: str
    nbytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def foresee(section: SampleSection) -> SampleForesight:
    """Look at what a sampling run would read.

    Raises:
        DyditError: For whatever would end the run before it reads weights.
    """
    checked = check_run(
        section.model,
        {
            name: getattr(section, name)
            for name in (
                "classes",
                "num_images",
                "steps",
                "guidance",
                "guidance_channels",
                "sampler",
                "seed",
                "batch_size",
                "deterministic",
            )
        },
        TextRequest(section.prompt, section.prompts, section.pipeline, section.cache),
        vae=section.vae,
        height=section.height,
        width=section.width,
        video_formats=section.video_formats,
        fps=section.fps,
    )
    refuse_existing(section.out, section.overwrite)
    device = find_device(section.device)
    model = _shell(checked, section)
    settings, latent = checked.settings, model.geometry.sample_shape
    reduction = _reduction(checked, section)
    if reduction is None:
        kind, shape, size = "latents", latent, LATENT
        copies = 1
    else:
        frames = latent[:-3]
        kind = "videos" if frames else "images"
        sides = (section.height or latent[-2] * reduction, section.width or latent[-1] * reduction)
        shape, size = (*frames, *sides, COLOURS), 1
        # samples.npz, and once more in each kind of file.
        copies = 1 + (len(section.video_formats) if frames else 1)
    numbers = 1
    for side in shape:
        numbers *= side
    return SampleForesight(
        model=section.model,
        family=model.family,
        read_bytes=sum(file.stat().st_size for file in model_folder(section.model).glob("*.safetensors")),
        kind=kind,
        samples=settings.num_images,
        batch=max(map(len, settings.batches())),
        shape=shape,
        sampler=settings.sampler.name,
        steps=None if settings.sampler.adaptive else settings.steps,
        guidance=section.guidance if checked.texts else settings.guidance.scale,
        branches=1 if checked.texts else settings.guidance.branches,
        static_gmacs=count_macs(model).total / 1e9,
        device=str(device),
        nbytes=settings.num_images * numbers * size * copies,
    )


def _shell(checked: CheckedRun, section: SampleSection) -> DynamicModel:
    """The model without its weights, in the execution that is asked for.

    Raises:
        DyditError: For an execution, a dial or a budget that it does not have.
    """
    arguments = {name: value for name, value in checked.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model = checked.model_class(**arguments)
    # Graphs need the device itself, which is not touched here.
    model.set_execution(section.execution, section.compile, token_capacity=section.token_capacity)
    model.set_keep_bias(section.keep_bias)
    if section.budget is not None:
        model.set_budget(section.budget)
    return model


def _reduction(checked: CheckedRun, section: SampleSection) -> int | None:
    """Pixels of a side a number of the latent; None if latents are written."""
    if makes_pixels(checked.channels) and not checked.texts:
        return 1
    if section.vae is None and checked.parts is None:
        return None
    folder = Path(section.vae).expanduser() if section.vae is not None else checked.parts.part("vae")  # type: ignore[union-attr]
    _, config = autoencoder_config(folder)
    return int(2 ** (len(config["block_out_channels"]) - 1))
