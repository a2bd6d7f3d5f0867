"""`dydit sample`: draw images with a dynamic model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, foresight, options, stage
from dydit_cli.cli.launched import run_in_processes
from dydit_cli.cli.progress import progress_bar
from dydit_cli.cli.standing import beside, warn_if_hardly_cheaper
from dydit_cli.processes.environment import is_launched
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.recipe.schema import SampleSection
    from dydit_cli.sampling.run import SampleReport

EXAMPLES = (
    "dydit sample --model runs/t --classes 0,1 --num-images 8 --steps 50 --guidance 1.5 --out runs/s",
    "dydit sample --model runs/t --num-images 50000 --steps 250 --vae sd-vae-ft-ema --batch-size 64 --out runs/fid",
    "dydit sample --model runs/t --execution static --out runs/s-static",
    'dydit sample --model runs/flux --prompt "a fox in the snow" --pipeline FLUX.1-dev --steps 28 --out runs/s',
)

TEXT, SAMPLER, MODEL, VIDEO = "Text to image", "Sampler", "Model", "Video models"


def sample(
    context: typer.Context,
    arguments: options.RecipeArguments = None,
    model: Annotated[str | None, typer.Option(help="Folder of a model.", metavar="FOLDER")] = None,
    classes: Annotated[str | None, options.classes()] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to draw; | separates several prompts.", rich_help_panel=TEXT)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts, one a line, used in turn.", metavar="FILE", rich_help_panel=TEXT),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Conditions that `dydit prepare` wrote, in place of prompts.",
            metavar="FOLDER",
            rich_help_panel=TEXT,
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Local FLUX pipeline: text encoders, vae and schedule.",
            metavar="FOLDER",
            rich_help_panel=TEXT,
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels.", show_default="the model's", rich_help_panel=TEXT)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels.", show_default="the model's", rich_help_panel=TEXT)
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Images to draw.", show_default="8")] = None,
    seed: Annotated[int | None, options.image_seed()] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="DiT, Latte: ddpm, ddim, dpm++. SiT: euler, heun, dopri5, sde. FLUX: euler.",
            show_default="ddpm or euler",
            rich_help_panel=SAMPLER,
            autocompletion=completing.choices("sampler"),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps; for an ODE, intervals; dopri5 chooses its own.",
            show_default="50",
            rich_help_panel=SAMPLER,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; 1 is none and runs half as many rows. FLUX: its input.",
            show_default="1.5; FLUX: 3.5",
            rich_help_panel=SAMPLER,
        ),
    ] = None,
    guidance_channels: Annotated[
        str | None,
        typer.Option(
            help="original (DiT and SiT three, Latte four), first3, or all (as diffusers' pipelines).",
            show_default="original",
            rich_help_panel=SAMPLER,
            autocompletion=completing.choices("guidance_channels"),
        ),
    ] = None,
    execution: Annotated[str | None, options.execution(rich_help_panel=MODEL)] = None,
    compile: Annotated[  # noqa: A002
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile blocks with torch.compile (compact and static); needs a C++ compiler on a CPU.",
            show_default="no-compile",
            rich_help_panel=MODEL,
        ),
    ] = None,
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs",
            help="Record steps as CUDA graphs (compact and static); needs a CUDA device.",
            show_default="no-graphs",
            rich_help_panel=MODEL,
        ),
    ] = None,
    token_capacity: Annotated[float | None, options.token_capacity(rich_help_panel=MODEL)] = None,
    budget: Annotated[float | None, options.budget(rich_help_panel=MODEL)] = None,
    keep_bias: Annotated[float | None, options.keep_bias(rich_help_panel=MODEL)] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Local AutoencoderKL, for latent models.",
            metavar="FOLDER",
            show_default="latents are saved",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[str | None, options.device(rich_help_panel=MODEL)] = None,
    dtype: Annotated[str | None, options.dtype(rich_help_panel=MODEL)] = None,
    batch_size: Annotated[int | None, options.batch_size(rich_help_panel=MODEL)] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="Make each image alone: the same bit for bit whatever the batch size, and slower.",
            show_default="no-deterministic",
            rich_help_panel=MODEL,
        ),
    ] = None,
    processes: Annotated[int | None, options.processes(rich_help_panel=MODEL)] = None,
    video_formats: Annotated[
        str | None,
        typer.Option(
            help="Some of mp4, gif, frames, grid.",
            metavar="NAME,NAME,…",
            show_default="mp4,gif,grid",
            rich_help_panel=VIDEO,
            autocompletion=completing.choices("video_formats"),
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames a second.", show_default="8.0", rich_help_panel=VIDEO),
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = None,
    dry_run: options.DryRun = False,
    json: options.AsJson = False,
) -> None:
    """Draw images with a dynamic model.

    Writes PNG files, a grid and samples.npz (for FID tools), or latents where the model works on them and no --vae is given;
    of a video model, MP4 files, GIFs and grids.
    Image i is the same whatever the batch size up to rounding, so that runs of one seed can be compared image by image;
    --deterministic makes it the same bit for bit on one device.
    """
    from dydit_cli.recipe.schema import SampleSection

    request = stage.resolve(context, SampleSection)
    _note_idle(request.section)
    if dry_run:
        foresight.show(_foreseen(request.section), context, request.recipe.to_yaml(), as_json=json)
        return
    run_in_processes(context, request.section.processes)
    report = sample_with_progress(request.section, request.recipe.to_yaml())
    if report.kind == "latents":
        console.warn(f"the model makes latents, and no --vae was given: {report.out} holds no pictures.")
    warn_if_hardly_cheaper(report.trajectory_ratio, request.section.model, report.execution)
    if json:
        from dataclasses import asdict

        console.emit_json(asdict(report))
        return
    console.results().print(summary(report))
    console.say(f"Written to {report.out}: {', '.join(report.files)}")
    console.note(f"next: {_next_command(request.section, report)}")


def _foreseen(section: SampleSection) -> foresight.Foresight:
    """What `--dry-run` shows."""
    from dydit_cli.cli.plan import size
    from dydit_cli.export.lineage import lineage_of
    from dydit_cli.sampling.foresight import foresee

    seen = foresee(section)
    reads = [("model", f"{seen.model} ({seen.family}), {size(seen.read_bytes)} of weights")]
    reads += [
        (name, str(value))
        for name in ("pipeline", "prompts", "cache", "vae")
        if (value := getattr(section, name)) is not None
    ]
    steps = "steps of its own choice" if seen.steps is None else f"{seen.steps} steps"
    guidance = "" if seen.guidance is None else f", guidance {seen.guidance:g}"
    ratio = lineage_of(section.model).ratio
    cost = f"{seen.static_gmacs * seen.branches:.3g} GMACs a step and sample of the complete model"
    if section.execution == "static":
        ratio = None
    elif ratio is not None:
        cost += f"; held out, the model did {ratio:.3f} of attention and MLP"
    return foresight.Foresight(
        reads=reads,
        makes=[
            (
                seen.kind,
                f"{seen.samples:,} of {' x '.join(map(str, seen.shape))}, in batches of {seen.batch}",
            ),
            ("sampler", f"{seen.sampler}, {steps}{guidance}"),
            ("cost", cost),
            ("runs on", f"{seen.device}, {section.execution} execution, {section.dtype}"),
        ],
        out=section.out,
        nbytes=seen.nbytes,
        exact=seen.kind == "latents",
        facts=seen.as_json() | {"ratio": ratio},
    )


def _note_idle(section: SampleSection) -> None:
    """Warn of processes that will have nothing to do, where these are started."""
    batches = -(-section.num_images // (1 if section.deterministic else section.batch_size))
    if batches < section.processes and not is_launched():
        console.warn(
            f"{section.num_images} images in batches of {section.batch_size} keep {batches} of {section.processes} processes busy; "
            f"pass --batch-size {max(1, section.num_images // section.processes)} to use all."
        )


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
    table.add_row(report.kind, f"{report.images}")
    steps = "steps of its own choice" if report.steps is None else f"{report.steps} steps"
    guidance = "" if report.guidance is None else f", guidance {report.guidance:g}"
    table.add_row("sampler", f"{report.sampler}, {steps}{guidance}")
    unit = "video" if report.kind == "videos" else "image"
    table.add_row(
        "model calls",
        f"{report.evaluations:g} {'a' if unit == 'video' else 'an'} {unit} ({report.execution}, {report.dtype})",
    )
    table.add_row("time", f"{report.seconds:.1f} s, {report.images_per_second:.3g} {unit}s/s")
    table.add_row(
        "trajectory ratio", f"{report.trajectory_ratio:.3f} of the static model's attention and MLP MACs"
    )
    table.add_row("device", f"{report.device}, torch {report.torch}")
    return table


def _next_command(section: SampleSection, report: SampleReport) -> str:
    model = quoted(section.model)
    if report.kind == "latents":
        pictures = beside(section.out, f"{section.out.name}-pictures")
        return f"dydit sample --model {model} --vae VAE --num-images {section.num_images} --seed {section.seed} --out {pictures}"
    if (Path(section.model).expanduser() / "transformer").is_dir():
        # It is an export already.
        steps = "" if report.steps is None else f" --steps {report.steps}"
        out = beside(section.out, "evaluation")
        return f"dydit evaluate {model} --against static --sampler {report.sampler}{steps} --num-images 500 --out {out}"
    return f"dydit export --model {model} --format diffusers --out {beside(section.out, 'export')}"
