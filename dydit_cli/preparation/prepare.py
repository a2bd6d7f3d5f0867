"""From pictures, or from prompts alone, to a cache that training reads.

A run that was killed goes on with ``resume``: shards are written whole, and each remembers the plan that it belongs to. The index
comes last, so that a cache without it is known to be unfinished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import atomic_write, write_json, write_manifest
from dydit_cli.artifacts.writing import refuse_existing, writing
from dydit_cli.data.cache import INDEX, SAMPLES, CacheIndex, LatentShard, TextShape, TextShard
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError
from dydit_cli.pipelines.autoencoder import Autoencoder, open_autoencoder
from dydit_cli.pipelines.folder import PipelineFolder, open_pipeline
from dydit_cli.pipelines.text import TextEncoders
from dydit_cli.preparation.cropping import bucket_sizes, choose_size
from dydit_cli.preparation.generation import GenerationJob, read_prompts
from dydit_cli.preparation.pictures import Picture, Pictures, captioned, find_pictures, labelled
from dydit_cli.preparation.processes import encode_shards
from dydit_cli.preparation.shards import SAMPLES_A_SHARD, EncodingJob, PlannedShard, is_written
from dydit_cli.preparation.texts import write_texts
from dydit_cli.recipe.schema import PrepareSection

STAGE = "prepare"
PACK = 2
"""Latent pixels on a side of a token of FLUX."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation made.

    Attributes:
        out: The folder.
        kind: ``texts`` or ``classes``.
        samples: Latents.
        texts: Distinct captions.
        classes: Names of the classes.
        sizes: Samples by size of the picture, as ``WxH``.
        left_out: Pictures without a caption or class.
        reused: Samples that an earlier run had encoded.
        channels: Of the latents.
        mirrored: Whether mirrored pictures were encoded as well.
        nbytes: Of all files.
    """

    out: str
    kind: str
    samples: int
    texts: int
    classes: tuple[str, ...]
    sizes: dict[str, int]
    left_out: int
    reused: int
    channels: int
    mirrored: bool
    nbytes: int


def prepare(
    settings: PrepareSection,
    *,
    recipe_yaml: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> PrepareReport:
    """Prepare what a recipe's section asks for.

    Args:
        settings: The section.
        recipe_yaml: The resolved recipe, kept beside the cache.
        on_progress: Told how far it is.

    Raises:
        DyditError: for whatever is missing, damaged or does not fit together.
    """
    out = Path(settings.out)
    pipeline = open_pipeline(settings.pipeline) if settings.pipeline is not None else None
    if check_room(out, settings):
        shutil.rmtree(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if settings.prompts is not None:
        if pipeline is None:
            raise TypeError("the schema asks for a pipeline with prompts")
        index, report = _from_prompts(settings, pipeline, on_progress)
    else:
        index, report = _from_pictures(settings, pipeline, on_progress)
    write_json(out / INDEX, index.as_json())
    if recipe_yaml is not None:
        with atomic_write(out / "recipe.yaml") as temporary:
            temporary.write_text(recipe_yaml, encoding="utf-8")
    write_manifest(
        out,
        stage=STAGE,
        settings=settings.model_dump(mode="json"),
        parent=None,
        results=asdict(report),
        device=find_device(settings.device),
    )
    return report


def check_room(out: Path, settings: PrepareSection) -> bool:
    """Whether an older cache stands where this one goes, and is to be replaced.

    Raises:
        DyditError: If something stands there that may not be.
    """
    if settings.resume:
        if out.exists() and any(out.iterdir()) and not any(out.glob("*.safetensors")):
            raise DyditError(
                f"There is no preparation to resume in {out}.",
                why="It holds other things.",
                fix="Choose another --out.",
            )
        return False
    refuse_existing(out, settings.overwrite)
    if out.is_dir() and any(out.iterdir()):
        if not any(
            (out / name).exists() for name in (INDEX, "text_00000.safetensors", "latents_00000.safetensors")
        ):
            raise DyditError(
                f"{out} is not a cache of dydit.",
                why="--overwrite replaces caches only.",
                fix="Choose another --out, or empty that folder yourself.",
            )
        return True
    return False


def _from_pictures(
    settings: PrepareSection, pipeline: PipelineFolder | None, on_progress: Progress
) -> tuple[CacheIndex, PrepareReport]:
    out = Path(settings.out)
    if settings.data is None:
        raise TypeError("the schema asks for data without prompts")
    on_progress("looking for pictures", 0, 1)
    device = find_device(settings.device)
    planned = plan_pictures(settings, pipeline)
    pictures, prompts, shards, autoencoder = (
        planned.pictures,
        planned.prompts,
        planned.shards,
        planned.autoencoder,
    )
    texts = pipeline is not None
    shape: TextShape | None = None
    files: tuple[TextShard, ...] = ()
    if pipeline is not None:
        encoders = TextEncoders(pipeline, device, getattr(torch, settings.dtype), settings.text_tokens)
        shape, files = write_texts(out, prompts, encoders, on_progress)
    done = {shard.number for shard in shards if is_written(out, shard)}
    job = EncodingJob(
        out, autoencoder.folder, pictures, settings.mirror, settings.batch_size, settings.device
    )
    total = sum(len(shard.pictures) for shard in shards)
    reused = encoded = sum(len(shard.pictures) for shard in shards if shard.number in done)

    def more(count: int) -> None:
        nonlocal encoded
        encoded += count
        on_progress("encoding pictures", encoded, total)

    on_progress("encoding pictures", encoded, total)
    encode_shards(job, [s for s in shards if s.number not in done], settings.processes, more)
    _write_samples(out, shards, prompts, pictures.classes)
    index = CacheIndex(
        channels=autoencoder.channels,
        scale=autoencoder.scaling_factor,
        shift=autoencoder.shift_factor,
        posterior=autoencoder.posterior,
        mirrored=settings.mirror,
        latents=tuple(_described(shard, autoencoder.reduction) for shard in shards),
        classes=() if texts else pictures.classes,
        text=shape,
        texts=files,
    )
    return index, _report(settings, index, shards, len(prompts), planned.left_out, reused)


@dataclass(frozen=True)
class Planned:
    """What a preparation will make of pictures.

    Attributes:
        pictures: The collection.
        prompts: Distinct captions; none where classes are stored.
        shards: Which picture goes into which file.
        autoencoder: On the CPU.
        left_out: Pictures without a caption or class, or beyond the limit.
    """

    pictures: Pictures
    prompts: list[str]
    shards: list[PlannedShard]
    autoencoder: Autoencoder
    left_out: int


def plan_pictures(settings: PrepareSection, pipeline: PipelineFolder | None) -> Planned:
    """Look through a collection of pictures, and encode none.

    Args:
        settings: With ``data``.
        pipeline: Whose text encoders take the captions; None for classes.

    Raises:
        DyditError: for whatever is missing or does not fit together.
    """
    if settings.data is None:
        raise TypeError("the schema asks for data without prompts")
    pictures = find_pictures(settings.data)
    texts = pipeline is not None
    kept = captioned(pictures, settings.caption) if texts else labelled(pictures)
    if settings.limit is not None:
        kept = kept[:: max(1, len(kept) // settings.limit)][: settings.limit]
    vae_folder = Path(settings.vae).expanduser() if settings.vae else _vae_of(pipeline)
    autoencoder = open_autoencoder(vae_folder, torch.device("cpu"))
    prompts = list(dict.fromkeys(str(picture.caption) for picture in kept)) if texts else []
    shards = _plan(settings, pictures, kept, prompts, autoencoder, square=not texts)
    return Planned(pictures, prompts, shards, autoencoder, len(pictures.found) - len(kept))


def _vae_of(pipeline: PipelineFolder | None) -> Path:
    if pipeline is None:
        raise TypeError("the schema asks for a vae or a pipeline")
    return pipeline.part("vae")


def _plan(
    settings: PrepareSection,
    pictures: Pictures,
    kept: Sequence[Picture],
    prompts: Sequence[str],
    autoencoder: Autoencoder,
    *,
    square: bool,
) -> list[PlannedShard]:
    """Which picture goes into which file: by size, in their stable order."""
    multiple = autoencoder.reduction * (1 if square else PACK)
    sizes = bucket_sizes(settings.resolution, multiple, square or not settings.buckets)
    if sizes[0][0] == 0:
        raise DyditError(
            f"A resolution of {min(settings.resolution)} is too small.",
            why=f"The autoencoder and the patches reduce pictures {multiple} times.",
            fix=f"Pass --resolution {multiple} or a multiple of it.",
        )
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    buckets: dict[tuple[int, int], list[Picture]] = {}
    for picture in kept:
        if len(sizes) == 1:
            size = sizes[0]
        else:
            size = choose_size(*pictures.open(picture).size, sizes)
        buckets.setdefault(size, []).append(picture)
    shards: list[PlannedShard] = []
    for (width, height), members in sorted(buckets.items()):
        for start in range(0, len(members), SAMPLES_A_SHARD):
            part = tuple(members[start : start + SAMPLES_A_SHARD])
            texts = tuple(numbers[str(picture.caption)] for picture in part) if prompts else ()
            shards.append(PlannedShard(len(shards), width, height, part, texts))
    return shards


def _from_prompts(
    settings: PrepareSection, pipeline: PipelineFolder, on_progress: Progress
) -> tuple[CacheIndex, PrepareReport]:
    out, device = Path(settings.out), find_device(settings.device)
    prompts = read_prompts(Path(str(settings.prompts)).expanduser())
    count = settings.count or len(prompts)
    distinct = list(dict.fromkeys(prompts))[:count]
    autoencoder = open_autoencoder(pipeline.part("vae"), torch.device("cpu"))
    shards = plan_drawings(settings, distinct, count, autoencoder)
    encoders = TextEncoders(pipeline, device, getattr(torch, settings.dtype), settings.text_tokens)
    shape, files = write_texts(out, distinct, encoders, on_progress)
    left = [shard for shard in shards if not is_written(out, shard)]
    reused = count - sum(len(shard.pictures) for shard in left)
    if left:
        GenerationJob(
            out=out,
            pipeline=pipeline,
            autoencoder=autoencoder,
            tokens=encoders.tokens,
            steps=settings.steps,
            guidance=settings.guidance,
            seed=settings.seed,
            batch_size=settings.batch_size,
            device=device,
            dtype=getattr(torch, settings.dtype),
        ).run(left, lambda done: on_progress("drawing latents", reused + done, count))
    _write_samples(out, shards, distinct, ())
    index = CacheIndex(
        channels=autoencoder.channels,
        # What a pipeline draws is at the model's scale.
        scale=1.0,
        shift=0.0,
        posterior=False,
        mirrored=False,
        latents=tuple(_described(shard, autoencoder.reduction) for shard in shards),
        text=shape,
        texts=files,
    )
    return index, _report(settings, index, shards, len(distinct), 0, reused)


def plan_drawings(
    settings: PrepareSection, prompts: Sequence[str], count: int, autoencoder: Autoencoder
) -> list[PlannedShard]:
    """Which latents are drawn into which file.

    Args:
        settings: With resolutions.
        prompts: Distinct.
        count: Latents.
        autoencoder: Of the pipeline.
    """
    sides = [
        side // (autoencoder.reduction * PACK) * autoencoder.reduction * PACK for side in settings.resolution
    ]
    shards = []
    for number, start in enumerate(range(0, count, SAMPLES_A_SHARD)):
        texts = [index % len(prompts) for index in range(start, min(start + SAMPLES_A_SHARD, count))]
        pictures = tuple(
            Picture(f"{start + place}: {prompts[text]}", start + place, prompts[text])
            for place, text in enumerate(texts)
        )
        side = sides[number % len(sides)]
        shards.append(PlannedShard(number, side, side, pictures, tuple(texts)))
    return shards


def _described(shard: PlannedShard, reduction: int) -> LatentShard:
    return LatentShard(shard.file, len(shard.pictures), shard.height // reduction, shard.width // reduction)


def _write_samples(
    out: Path, shards: Sequence[PlannedShard], prompts: Sequence[str], classes: Sequence[str]
) -> None:
    lines = []
    for shard in shards:
        for place, picture in enumerate(shard.pictures):
            said = (
                {"prompt": prompts[shard.texts[place]]}
                if shard.texts
                else {"label": picture.label, "class": classes[picture.label or 0]}
            )
            lines.append(json.dumps({"key": picture.key, "file": shard.file, **said}, ensure_ascii=False))
    with atomic_write(out / SAMPLES) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _report(
    settings: PrepareSection,
    index: CacheIndex,
    shards: Sequence[PlannedShard],
    texts: int,
    left_out: int,
    reused: int,
) -> PrepareReport:
    sizes: dict[str, int] = {}
    for shard in shards:
        name = f"{shard.width}x{shard.height}"
        sizes[name] = sizes.get(name, 0) + len(shard.pictures)
    files: list[Any] = [*index.latents, *index.texts]
    return PrepareReport(
        out=str(settings.out),
        kind="classes" if index.text is None else "texts",
        samples=sum(shard.samples for shard in index.latents),
        texts=texts,
        classes=index.classes,
        sizes=sizes,
        left_out=left_out,
        reused=reused,
        channels=index.channels,
        mirrored=index.mirrored,
        nbytes=sum((Path(settings.out) / shard.file).stat().st_size for shard in files),
    )
