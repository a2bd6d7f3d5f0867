"""What a preparation would read and write, without encoding anything: `dydit prepare --dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.pipelines.autoencoder import Autoencoder, open_autoencoder
from dydit_cli.pipelines.folder import PipelineFolder, open_pipeline
from dydit_cli.pipelines.text import TextEncoders
from dydit_cli.preparation.generation import read_prompts
from dydit_cli.preparation.prepare import check_room, plan_drawings, plan_pictures
from dydit_cli.preparation.shards import PlannedShard, is_written
from dydit_cli.recipe.schema import PrepareSection

LATENT = 4
"""Bytes of a number of a latent: autoencoders run in fp32."""

ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class PrepareForesight:
    """What would be made.

    Attributes:
        source: Where pictures or prompts come from.
        out: The folder.
        kind: ``texts``, ``classes`` or ``drawings``.
        samples: Latents.
        done: Of them, those that an earlier run has written, where this one resumes.
        texts: Distinct captions.
        classes: Names of the classes.
        sizes: Samples by size of the picture, as ``WxH``.
        left_out: Pictures without a caption or class, or beyond the limit.
        channels: Of the latents.
        latent_bytes, text_bytes: Of what is written.
        encoder_bytes: Of the weights of the largest text encoder, of which one is in memory at a time; 0 without texts.
        transformer_bytes: Of the weights of the pipeline's transformer, where it draws; 0 otherwise.
    """

    source: str
    out: str
    kind: str
    samples: int
    done: int
    texts: int
    classes: tuple[str, ...]
    sizes: dict[str, int]
    left_out: int
    channels: int
    latent_bytes: int
    text_bytes: int
    encoder_bytes: int
    transformer_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def foresee(settings: PrepareSection) -> PrepareForesight:
    """Look through what a preparation would read.

    Raises:
        DyditError: For whatever would end it before it encodes anything.
    """
    out = Path(settings.out)
    pipeline = open_pipeline(settings.pipeline) if settings.pipeline is not None else None
    check_room(out, settings)
    classes: tuple[str, ...] = ()
    left_out = 0
    if settings.prompts is not None:
        if pipeline is None:
            raise TypeError("the schema asks for a pipeline with prompts")
        read = read_prompts(Path(settings.prompts).expanduser())
        count = settings.count or len(read)
        prompts = list(dict.fromkeys(read))[:count]
        autoencoder = open_autoencoder(pipeline.part("vae"), torch.device("cpu"))
        shards = plan_drawings(settings, prompts, count, autoencoder)
        kind, numbers = "drawings", 1
    else:
        planned = plan_pictures(settings, pipeline)
        prompts, shards, autoencoder = planned.prompts, planned.shards, planned.autoencoder
        left_out = planned.left_out
        kind = "classes" if pipeline is None else "texts"
        classes = planned.pictures.classes if pipeline is None else ()
        # A mean and a log variance, of the picture and of its mirror image.
        numbers = (2 if autoencoder.posterior else 1) * (2 if settings.mirror else 1)
    sizes: dict[str, int] = {}
    for shard in shards:
        name = f"{shard.width}x{shard.height}"
        sizes[name] = sizes.get(name, 0) + len(shard.pictures)
    return PrepareForesight(
        source=str(settings.prompts or settings.data),
        out=str(out),
        kind=kind,
        samples=sum(sizes.values()),
        done=sum(len(shard.pictures) for shard in shards if settings.resume and is_written(out, shard)),
        texts=len(prompts),
        classes=classes,
        sizes=sizes,
        left_out=left_out,
        channels=autoencoder.channels,
        latent_bytes=sum(_latents(shard, autoencoder) for shard in shards) * numbers,
        text_bytes=0 if pipeline is None else len(prompts) * _text(settings, pipeline),
        encoder_bytes=0 if pipeline is None else max(_weights(pipeline.path / name) for name in ENCODERS),
        transformer_bytes=_weights(pipeline.path / "transformer") if pipeline and kind == "drawings" else 0,
    )


def _latents(shard: PlannedShard, autoencoder: Autoencoder) -> int:
    side = autoencoder.reduction
    return (
        len(shard.pictures) * autoencoder.channels * (shard.height // side) * (shard.width // side) * LATENT
    )


def _text(settings: PrepareSection, pipeline: PipelineFolder) -> int:
    """Bytes of a caption's embeddings, from the encoders' configurations."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    tokens = TextEncoders(pipeline, torch.device("cpu"), dtype, settings.text_tokens).tokens
    width = int(pipeline.config("text_encoder_2").get("d_model", 4096))
    pooled = int(pipeline.config("text_encoder").get("hidden_size", 768))
    return (tokens * width + pooled) * dtype.itemsize


def _weights(folder: Path) -> int:
    """Bytes of the weight files of a part, which may be absent."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
