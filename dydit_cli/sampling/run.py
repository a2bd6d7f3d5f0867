"""One sampling run: from a model's folder to a folder of images that says how they were made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import artifact_folder, load_model, write_manifest
from dydit_cli.artifacts.manifest import device_description
from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.errors import DyditError
from dydit_cli.pipelines.autoencoder import Autoencoder
from dydit_cli.processes.world import World, join
from dydit_cli.sampling.checking import check_run
from dydit_cli.sampling.decoding import ROUNDING, VaeDecoder, makes_pixels, open_vae
from dydit_cli.sampling.generate import Batch, Progress, generate
from dydit_cli.sampling.prompts import TextRequest
from dydit_cli.sampling.text_run import strength_of, text_arguments
from dydit_cli.sampling.video_writing import DEFAULT_FORMATS, DEFAULT_FPS, VideoWriter
from dydit_cli.sampling.writing import SampleWriter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SampleReport:
    """What a run made, and what it took.

    Attributes:
        out: The folder.
        files: What is in it, beside the manifest.
        kind: ``images``, ``videos`` or ``latents``.
        images: How many; of a video model, videos, here and below.
        seconds: Wall time of sampling, decoding and writing; loading is left out.
        images_per_second: Their quotient.
        trajectory_ratio: Executed share of attention and MLP MACs along the sampler's own trajectories, mean over the images.
        evaluations: Calls of the model an image, mean over the images; two branches of guidance are one call.
        sampler: Its name. steps: As asked; None for one that chooses its own. guidance: Scale; None where the model takes none.
        execution: dense, compact or static.
        device: In words. dtype: Of weights and activations. torch: Version.
        rounding: How values became bytes; None for latents.
    """

    out: str
    files: list[str]
    kind: str
    images: int
    seconds: float
    images_per_second: float
    trajectory_ratio: float
    evaluations: float
    sampler: str
    steps: int | None
    guidance: float | None
    execution: str
    device: str
    dtype: str
    torch: str
    rounding: str | None


def sample(
    model: str | Path,
    out: str | Path,
    *,
    classes: Sequence[int] | None = None,
    num_images: int = 8,
    steps: int = 50,
    guidance: float | None = None,
    guidance_channels: str = "original",
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    execution: str = "compact",
    compile: bool = False,  # noqa: A002
    graphs: bool = False,
    token_capacity: float | None = None,
    keep_bias: float = 0.0,
    budget: float | None = None,
    vae: str | Path | None = None,
    prompt: str | None = None,
    prompts: str | Path | None = None,
    cache: str | Path | None = None,
    pipeline: str | Path | None = None,
    height: int | None = None,
    width: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    deterministic: bool = False,
    processes: int = 1,
    video_formats: Sequence[str] = DEFAULT_FORMATS,
    fps: float = DEFAULT_FPS,
    overwrite: bool = False,
    recipe_yaml: str | None = None,
    on_progress: Progress | None = None,
) -> SampleReport:
    """Sample from a dynamic model into a folder.

    Args:
        model: Folder of a model; see `dydit_cli.load_model`.
        out: Folder to write: images, videos or latents, and ``manifest.json``.
        classes: Labels, used in turn; None is all of them in turn.
        num_images: Images.
        steps: Steps of the sampler.
        guidance: Classifier-free guidance, 1.5 by default; 1 runs one branch. Of FLUX, its input, 3.5 by default.
        guidance_channels: ``original``, ``first3`` or ``all``.
        sampler: None is the family's default.
        seed: Image i depends on (seed, i) alone.
        batch_size: Images in one forward.
        execution: ``compact``, ``dense`` or ``static``.
        compile: Whether blocks are compiled; for compact and static execution.
        graphs: Whether steps are recorded as CUDA graphs; for compact and static execution.
        token_capacity: Room for this share of the tokens in MLPs; for compact execution.
        keep_bias: Added to all router logits.
        budget: The ratio to run at, of a model trained for a range of them.
        vae: Local AutoencoderKL folder; without it a latent model's latents are saved.
        prompt, prompts, cache, pipeline: Of a model of texts; see `TextRequest`. The pipeline's autoencoder decodes.
        height, width: Of its images, in pixels; the reference resolution by default.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        deterministic: Each image alone, the same bit for bit whatever the batch size; see `generate`.
        processes: Processes that share the batches, of which this is one; the first writes. `dydit sample --processes` starts them.
        video_formats: What a video model's samples become: some of ``mp4``, ``gif``, ``frames`` and ``grid``.
        fps: Frames a second of these files.
        overwrite: Replace ``out``.
        recipe_yaml: The resolved recipe, kept beside the images.
        on_progress: See `generate`.

    Raises:
        DyditError: For anything that cannot be, before the weights are read where possible; nothing is left half-written.
    """
    request: dict[str, Any] = {
        "classes": classes,
        "num_images": num_images,
        "steps": steps,
        "guidance": guidance,
        "guidance_channels": guidance_channels,
        "sampler": sampler,
        "seed": seed,
        "batch_size": batch_size,
        "deterministic": deterministic,
    }
    text = TextRequest(prompt, prompts, pipeline, cache)
    checked = check_run(
        model, request, text, vae=vae, height=height, width=width, video_formats=video_formats, fps=fps
    )
    settings, texts = checked.settings, checked.texts
    world = join(processes, device)
    place, number_type = world.device(device), _dtype_named(dtype)
    refuse_existing(Path(out), overwrite)

    loaded = load_model(
        model,
        execution=execution,
        compile=compile,
        graphs=graphs,
        token_capacity=token_capacity,
        torch_dtype=number_type,
        device=place,
        keep_bias=keep_bias,
        budget=budget,
        convention="native",
    )
    decoder: VaeDecoder | Autoencoder | None
    asked: dict[str, Any] = {}
    said: tuple[str, ...] = ()
    if texts:
        asked, decoder, said = text_arguments(
            loaded, text, checked.parts, vae, guidance, height, width, place, number_type
        )
        settings = replace(settings, classes=tuple(range(len(said))))
    else:
        decoder = open_vae(vae, checked.channels, place) if vae is not None else None
    labels = [settings.label(index) for index in range(num_images)]
    pixels = (makes_pixels(checked.channels) and not texts) or decoder is not None
    # Latents are written as they are, whatever they are latents of.
    videos = pixels and len(loaded.geometry.sample_shape) == 4
    with artifact_folder(out, overwrite=overwrite) if world.is_first else nullcontext(Path(out)) as folder:
        writer: SampleWriter | VideoWriter
        if videos:
            writer = VideoWriter(folder, num_images, decoder, formats=video_formats, fps=fps)
        else:
            writer = SampleWriter(folder, num_images, labels, decoder)
        with writer:
            batches = generate(loaded, **request, **asked, on_progress=on_progress, world=world)
            totals = write_all(batches, math.ceil(settings.num_batches / world.size), writer, world)
        report = SampleReport(
            out=str(out),
            files=writer.files,
            kind="videos" if videos else "images" if pixels else "latents",
            images=num_images,
            seconds=totals.seconds,
            images_per_second=num_images / totals.seconds,
            trajectory_ratio=totals.ratios / num_images,
            evaluations=totals.evaluations / num_images,
            sampler=settings.sampler.name,
            steps=None if settings.sampler.adaptive else steps,
            guidance=strength_of(asked) if texts else settings.guidance.scale,
            execution=loaded.execution,
            device=device_description(place),
            dtype=dtype,
            torch=torch.__version__,
            rounding=ROUNDING if pixels else None,
        )
        if not world.is_first:
            return report
        if recipe_yaml is not None:
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        used = request | {
            "classes": None if classes is None else list(classes),
            "sampler": settings.sampler.name,
            "guidance": report.guidance,
            "execution": execution,
            "compile": compile,
            "graphs": graphs,
            "token_capacity": token_capacity,
            # JSON has no word for infinity.
            "keep_bias": keep_bias if math.isfinite(keep_bias) else str(keep_bias),
            "budget": budget,
            "processes": processes,
            "dtype": dtype,
            "vae": None if vae is None else str(vae),
            "scaling_factor": decoder.scaling_factor if decoder is not None else None,
        }
        if texts:
            used |= {
                "prompt": prompt,
                "prompts": None if prompts is None else str(prompts),
                "cache": None if cache is None else str(cache),
                "pipeline": None if pipeline is None else str(pipeline),
                "height": height,
                "width": width,
                "texts": list(said),
            }
        if videos:
            used |= {"video_formats": list(video_formats), "fps": fps}
        write_manifest(
            folder, stage="sample", settings=used, parent=model, results=asdict(report), device=place
        )
    return report


@dataclass
class Totals:
    """Sums over the images of a run, and its wall time."""

    ratios: float = 0.0
    evaluations: int = 0
    seconds: float = 0.0


def write_all(
    batches: Iterator[Batch], rounds: int, writer: SampleWriter | VideoWriter, world: World
) -> Totals:
    """Write the batches of all processes in the order of the images; in each of the ``rounds``, every process makes one."""
    totals, started = Totals(), time.perf_counter()
    for _ in range(rounds):
        batch = next(batches, None)
        for images in world.to_first(None if batch is None else writer.finished(batch.samples)):
            if images is not None:
                writer.append(images)
        if batch is not None:
            totals.ratios += float(batch.ratios.sum())
            totals.evaluations += batch.evaluations * len(batch.indices)
    totals.seconds = time.perf_counter() - started
    parts = world.gather(totals)
    return Totals(sum(part.ratios for part in parts), sum(part.evaluations for part in parts), totals.seconds)


def _dtype_named(name: str) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    raise DyditError(
        f"'{name}' is not a type of numbers that models run in.",
        why=f"These are: {', '.join(DTYPES)}.",
        fix="Pass one of them.",
    )
