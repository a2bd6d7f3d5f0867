"""One sampling run: from a model's folder to a folder of images that says how they were made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import artifact_folder, load_model, model_config, write_manifest
from dydit_cli.artifacts.manifest import device_description
from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError
from dydit_cli.families.registry import class_named, family_named
from dydit_cli.sampling.decoding import ROUNDING, makes_pixels, open_vae, vae_config
from dydit_cli.sampling.generate import Batch, Progress, check_settings, generate
from dydit_cli.sampling.writing import SampleWriter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SampleReport:
    """What a run made, and what it took.

    Attributes:
        out: The folder.
        files: What is in it, beside the manifest.
        kind: ``images`` or ``latents``.
        images: How many.
        seconds: Wall time of sampling, decoding and writing; loading is left out.
        images_per_second: Their quotient.
        trajectory_ratio: Executed share of attention and MLP MACs along the sampler's own trajectories, mean over the images.
        evaluations: Calls of the model an image, mean over the images; two branches of guidance are one call.
        sampler: Its name. steps: As asked; None for one that chooses its own. guidance: Scale. execution: dense, compact or static.
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
    guidance: float
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
    guidance: float = 1.5,
    guidance_channels: str = "first3",
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    execution: str = "compact",
    compile: bool = False,  # noqa: A002
    keep_bias: float = 0.0,
    vae: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    deterministic: bool = False,
    overwrite: bool = False,
    recipe_yaml: str | None = None,
    on_progress: Progress | None = None,
) -> SampleReport:
    """Sample from a dynamic model into a folder.

    Args:
        model: Folder of a model; see `dydit_cli.load_model`.
        out: Folder to write: images or latents, and ``manifest.json``.
        classes: Labels, used in turn; None is all of them in turn.
        num_images: Images.
        steps: Steps of the sampler.
        guidance: Classifier-free guidance; 1 runs one branch.
        guidance_channels: ``first3`` or ``all``.
        sampler: None is the family's default.
        seed: Image i depends on (seed, i) alone.
        batch_size: Images in one forward.
        execution: ``compact``, ``dense`` or ``static``.
        compile: Whether blocks are compiled; for compact and static execution.
        keep_bias: Added to all router logits.
        vae: Local AutoencoderKL folder; without it a latent model's latents are saved.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        deterministic: Each image alone, the same bit for bit whatever the batch size; see `generate`.
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
    config = model_config(model)
    model_class = class_named(config["_class_name"])
    if model_class is None:
        raise TypeError(config["_class_name"])
    channels = int(config["in_channels"])
    settings = check_settings(
        family_named(model_class.family).objective, int(config["num_classes"]), **request
    )
    place, number_type = find_device(device), _dtype_named(dtype)
    refuse_existing(Path(out), overwrite)
    if vae is not None:
        vae_config(Path(vae).expanduser(), channels)

    loaded = load_model(
        model,
        execution=execution,
        compile=compile,
        torch_dtype=number_type,
        device=place,
        keep_bias=keep_bias,
        convention="native",
    )
    decoder = open_vae(vae, channels, place) if vae is not None else None
    labels = [settings.label(index) for index in range(num_images)]
    with artifact_folder(out, overwrite=overwrite) as folder:
        with SampleWriter(folder, num_images, labels, decoder) as writer:
            totals = _write_all(generate(loaded, **request, on_progress=on_progress), writer)
        images = makes_pixels(channels) or decoder is not None
        report = SampleReport(
            out=str(out),
            files=writer.files,
            kind="images" if images else "latents",
            images=num_images,
            seconds=totals.seconds,
            images_per_second=num_images / totals.seconds,
            trajectory_ratio=totals.ratios / num_images,
            evaluations=totals.evaluations / num_images,
            sampler=settings.sampler.name,
            steps=None if settings.sampler.adaptive else steps,
            guidance=guidance,
            execution=loaded.execution,
            device=device_description(place),
            dtype=dtype,
            torch=torch.__version__,
            rounding=ROUNDING if images else None,
        )
        if recipe_yaml is not None:
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        used = request | {
            "classes": None if classes is None else list(classes),
            "sampler": settings.sampler.name,
            "execution": execution,
            "compile": compile,
            # JSON has no word for infinity.
            "keep_bias": keep_bias if math.isfinite(keep_bias) else str(keep_bias),
            "dtype": dtype,
            "vae": None if vae is None else str(vae),
            "scaling_factor": decoder.scaling_factor if decoder is not None else None,
        }
        write_manifest(
            folder, stage="sample", settings=used, parent=model, results=asdict(report), device=place
        )
    return report


@dataclass
class _Totals:
    """Sums over the images of a run, and its wall time."""

    ratios: float = 0.0
    evaluations: int = 0
    seconds: float = 0.0


def _write_all(batches: Iterable[Batch], writer: SampleWriter) -> _Totals:
    totals, started = _Totals(), time.perf_counter()
    for batch in batches:
        writer.write(batch.samples)
        totals.ratios += float(batch.ratios.sum())
        totals.evaluations += batch.evaluations * len(batch.indices)
    totals.seconds = time.perf_counter() - started
    return totals


def _dtype_named(name: str) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    raise DyditError(
        f"'{name}' is not a type of numbers that models run in.",
        why=f"These are: {', '.join(DTYPES)}.",
        fix="Pass one of them.",
    )
