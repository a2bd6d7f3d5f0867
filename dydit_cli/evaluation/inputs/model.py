"""A model as a source of images: it samples with the sampling room's settings, batch by batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dydit_cli.artifacts import load_model, model_config
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.artifacts.manifest import weights_hash
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.inputs.source import ImageBatch
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import require
from dydit_cli.families.registry import class_named, family_named, family_of
from dydit_cli.flops import count_macs, router_macs
from dydit_cli.processes.world import ALONE, World
from dydit_cli.sampling.decoding import VaeDecoder, makes_pixels, open_vae, to_uint8
from dydit_cli.sampling.generate import check_settings, generate
from dydit_cli.sampling.run import DTYPES

MILLION = 1e6

TEXTS = "rectified-flow"
"""The objective of the families that read prompts (FLUX)."""


@dataclass(frozen=True)
class SamplingSettings:
    """How a model is asked for images; the keys of `dydit sample`."""

    num_images: int = 1000
    classes: Sequence[int] | None = None
    steps: int = 50
    guidance: float = 1.5
    guidance_channels: str = "original"
    sampler: str | None = None
    seed: int = 0
    batch_size: int = 32
    execution: str = "compact"
    keep_bias: float = 0.0
    budget: float | None = None
    vae: str | None = None
    device: str = "auto"
    dtype: str = "float32"


@dataclass(frozen=True)
class ModelImages:
    """Images of a model, made anew at every iteration. See `ImageSource`."""

    path: Path
    model: DynamicTransformer
    settings: SamplingSettings
    sampler: str
    classes: tuple[int, ...]
    decoder: VaeDecoder | None
    on_progress: Callable[[float], None] | None = None
    kind: str = "model"

    def __len__(self) -> int:
        return self.settings.num_images

    @property
    def labels(self) -> list[int]:
        """See `ImageSource`."""
        return [self.classes[index % len(self.classes)] for index in range(len(self))]

    def batches(self, size: int, world: World = ALONE) -> Iterator[ImageBatch]:
        """See `ImageSource`; the batch is the settings', because `size` is that of the feature network."""
        settings = self.settings
        made = generate(
            self.model,
            classes=self.classes,
            num_images=settings.num_images,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels,
            sampler=self.sampler,
            seed=settings.seed,
            batch_size=settings.batch_size,
            on_progress=self.on_progress,
            world=world,
        )
        while True:
            started = time.perf_counter()
            batch = next(made, None)
            if batch is None:
                return
            seconds = time.perf_counter() - started
            yield ImageBatch(self._images(batch.samples), batch.ratios.cpu(), seconds)

    def _images(self, samples: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, C) bytes; videos (B, F, C, h, w) frame by frame."""
        rows = samples.flatten(0, 1) if samples.ndim == 5 else samples
        images = to_uint8(rows if self.decoder is None else self.decoder.decode(rows))
        return images.unflatten(0, samples.shape[:2]) if samples.ndim == 5 else images

    def describe(self) -> dict[str, Any]:
        """See `ImageSource`."""
        settings = self.settings
        return {
            "kind": self.kind,
            "path": str(self.path),
            "images": len(self),
            "weights_sha256": weights_hash(model_folder(self.path)),
            "made_by": {
                "seed": settings.seed,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "guidance_channels": settings.guidance_channels,
                "sampler": self.sampler,
                "execution": settings.execution,
                "keep_bias": settings.keep_bias
                if math.isfinite(settings.keep_bias)
                else str(settings.keep_bias),
                "budget": settings.budget,
                "dtype": settings.dtype,
                "batch_size": settings.batch_size,
                "classes": list(self.classes),
                "vae": settings.vae,
            },
            "static_mmacs": count_macs(self.model).total / MILLION,
            "parameters": _parameters(self.model),
        }


def open_model(
    path: Path, settings: SamplingSettings, on_progress: Callable[[float], None] | None = None
) -> ModelImages:
    """Load a model for sampling, after its settings were checked.

    Raises:
        DyditError: If there is no such model, the settings do not fit it, or it makes latents and no autoencoder is given.
    """
    _refuse_texts(path)
    device = find_device(settings.device)
    model = load_model(
        path,
        execution=settings.execution,
        torch_dtype=DTYPES[settings.dtype],
        device=device,
        keep_bias=settings.keep_bias,
        budget=settings.budget,
        convention="native",
    )
    channels = model.geometry.in_channels
    checked = check_settings(
        family_of(model).objective,
        model.geometry.num_classes,
        classes=settings.classes,
        num_images=settings.num_images,
        steps=settings.steps,
        guidance=settings.guidance,
        guidance_channels=settings.guidance_channels,
        sampler=settings.sampler,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    if settings.vae is None and not makes_pixels(channels):
        raise DyditError(
            f"{path} makes latents, not images.",
            why=f"It works on {channels} channels of an autoencoder's latents; metrics judge pixels.",
            fix="Pass --vae FOLDER, a local AutoencoderKL that it was trained with.",
        )
    decoder = open_vae(settings.vae, channels, device) if settings.vae is not None else None
    # As they take effect: an unconditional model has nothing to be guided away from.
    used = replace(settings, guidance=checked.guidance.scale)
    return ModelImages(path, model, used, checked.sampler.name, checked.classes, decoder, on_progress)


def _refuse_texts(path: Path) -> None:
    """Raise for models of texts, and for those that only a pipeline runs."""
    model_class = class_named(str(model_config(path)["_class_name"]))
    if model_class is None:
        raise TypeError(path)
    family = family_named(model_class.family)
    require(family, "dydit sample")
    if family.objective == TEXTS:
        raise DyditError(
            f"{path} is a model of texts.",
            why="What it makes depends on prompts, which `dydit evaluate` does not hand to a model.",
            fix="Write images with `dydit sample --prompts FILE` and pass that folder; --against takes such a folder too.",
        )


def _parameters(model: DynamicTransformer) -> int:
    """Numbers of parameters; those of routers count where routers run."""
    every = sum(parameter.numel() for parameter in model.parameters())
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    return every - routers if model.execution == "static" else every


def executed_mmacs(model: DynamicTransformer, ratio: float) -> float:
    """MMACs of a forward whose attention and MLP execute ``ratio`` of the static model's; routers included unless static.

    LayerNorm is counted for all tokens, also for those that no MLP sees: less than a hundredth of a forward.
    """
    static = count_macs(model)
    routed = static.attention + static.mlp
    routers = 0.0 if model.execution == "static" else router_macs(model.geometry) * model.geometry.depth
    return (static.total - routed * (1 - ratio) + routers) / MILLION
