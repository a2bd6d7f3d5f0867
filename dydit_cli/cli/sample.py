"""`dydit sample`: draw images with a dynamic model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import console, stage
from dydit_cli.cli.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.recipe.schema import SampleSection
    from dydit_cli.sampling.run import SampleReport

EXAMPLES = (
    "dydit sample --model runs/t --classes 0,1 --num-images 8 --steps 50 --guidance 1.5 --out runs/s",
    "dydit sample --model runs/t --num-images 50000 --steps 250 --vae sd-vae-ft-ema --batch-size 64 --out runs/fid",
    "dydit sample --model runs/t --execution static --out runs/s-static",
)


def sample(
    context: typer.Context,
    arguments: stage.RecipeArguments = None,
    model: Annotated[str | None, typer.Option(help="Folder of a model.", metavar="FOLDER")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Labels, used in turn.", metavar="N,N,…", show_default="all in turn")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Images to draw.", show_default="8")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Image i depends on the seed and i alone.", show_default="0")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="DiT: ddpm, ddim, dpm++. SiT: euler, heun, dopri5, sde.",
            show_default="ddpm or euler",
            rich_help_panel="Sampler",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps; for an ODE, intervals; dopri5 chooses its own.",
            show_default="50",
            rich_help_panel="Sampler",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; 1 is none and runs half as many rows.",
            show_default="1.5",
            rich_help_panel="Sampler",
        ),
    ] = None,
    guidance_channels: Annotated[
        str | None,
        typer.Option(
            help="first3 (as the originals) or all (as diffusers' pipelines).",
            show_default="first3",
            rich_help_panel="Sampler",
        ),
    ] = None,
    execution: Annotated[
        str | None,
        typer.Option(
            help="compact, dense, or static (the complete model).",
            show_default="compact",
            rich_help_panel="Model",
        ),
    ] = None,
    compile: Annotated[  # noqa: A002
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile blocks with torch.compile (compact and static); needs a C++ compiler on a CPU.",
            show_default="no-compile",
            rich_help_panel="Model",
        ),
    ] = None,
    keep_bias: Annotated[
        float | None,
        typer.Option(
            help="Added to router logits: more keeps more; inf keeps everything.",
            show_default="0.0",
            rich_help_panel="Model",
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Local AutoencoderKL, for latent models.",
            metavar="FOLDER",
            show_default="latents are saved",
            rich_help_panel="Model",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto", rich_help_panel="Model"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", show_default="float32", rich_help_panel="Model"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in one forward.", show_default="32", rich_help_panel="Model")
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="Make each image alone: the same bit for bit whatever the batch size, and slower.",
            show_default="no-deterministic",
            rich_help_panel="Model",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite/--no-overwrite", help="Replace an existing folder.", show_default="no-overwrite"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Draw images with a dynamic model.

    Writes PNG files, a grid and samples.npz (for FID tools), or latents where the model works on them and no --vae is given.
    Image i is the same whatever the batch size up to rounding, so that runs of one seed can be compared image by image;
    --deterministic makes it the same bit for bit on one device.
    """
    from dydit_cli.recipe.schema import SampleSection

    request = stage.resolve(context, SampleSection)
    report = sample_with_progress(request.section, request.recipe.to_yaml())
    if report.kind == "latents":
        console.warn(f"the model makes latents, and no --vae was given: {report.out} holds no images.")
    if json:
        from dataclasses import asdict

        console.emit_json(asdict(report))
        return
    console.results().print(summary(report))
    console.say(f"Written to {report.out}: {', '.join(report.files)}")
    console.note(f"next: {_next_command(request.section, report)}")


def sample_with_progress(section: SampleSection, recipe_yaml: str | None = None) -> SampleReport:
    """Run a sampling run with a progress bar on stderr."""
    from dydit_cli.sampling.run import sample as run

    with progress_bar() as progress:
        task = progress.add_task("loading the model", total=section.num_images)
        return run(
            **section.model_dump(),
            recipe_yaml=recipe_yaml,
            on_progress=lambda done: progress.update(task, description="images", completed=done),
        )


def summary(report: SampleReport) -> Table:
    """The report as a table."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("images" if report.kind == "images" else "latents", f"{report.images}")
    steps = "steps of its own choice" if report.steps is None else f"{report.steps} steps"
    table.add_row("sampler", f"{report.sampler}, {steps}, guidance {report.guidance:g}")
    table.add_row("model calls", f"{report.evaluations:g} an image ({report.execution}, {report.dtype})")
    table.add_row("time", f"{report.seconds:.1f} s, {report.images_per_second:.3g} images/s")
    table.add_row(
        "trajectory ratio", f"{report.trajectory_ratio:.3f} of the static model's attention and MLP MACs"
    )
    table.add_row("device", f"{report.device}, torch {report.torch}")
    return table


def _next_command(section: SampleSection, report: SampleReport) -> str:
    model = shlex.quote(str(section.model))
    if report.kind == "latents":
        return f"dydit sample --model {model} --vae VAE --seed {section.seed} --out OUT"
    return f"dydit export --model {model} --format diffusers --out OUT"
