"""`dydit evaluate`: how good are the samples, and how far are they from the static model's?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, foresight, options, stage
from dydit_cli.cli.launched import run_in_processes
from dydit_cli.cli.progress import progress_bar
from dydit_cli.cli.standing import warn_if_hardly_cheaper
from dydit_cli.errors import DyditError
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from dydit_cli.evaluation.collecting import Progress
    from dydit_cli.evaluation.evaluate import Evaluated
    from dydit_cli.evaluation.settings import EvaluationSettings
    from dydit_cli.recipe.schema import EvaluateSection

EXAMPLES = (
    "dydit evaluate runs/t --num-images 2000 --steps 25 --sampler ddim --out runs/e",
    "dydit evaluate runs/t --against runs/c --num-images 500 --out runs/pairs --fail-if 'psnr<25'",
    "dydit evaluate samples.npz --extractor pt_inception-2015-12-05-6726825d.pth --reference VIRTUAL_imagenet256_labeled.npz",
    "dydit evaluate clips/ --videos --reference real-clips/ --extractor weights-inception-2015-12-05-6726825d.pth",
)

FAILED = 1
"""Exit code of a run whose condition holds."""

DEFAULT_IMAGES = 1000
PAIRS, SAMPLING = "Pairs", "Sampling"


def evaluate(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL | FOLDER | NPZ | RECIPE | KEY=VALUE",
            help="What to evaluate (a model's folder, a folder of images or frames, an .npz archive), a recipe, and changes to it.",
            show_default=False,
            autocompletion=completing.recipes,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a model, to sample.", metavar="FOLDER")] = None,
    samples: Annotated[
        str | None, typer.Option(help="Folder of images or frames, or .npz.", metavar="PATH")
    ] = None,
    videos: Annotated[
        bool | None,
        typer.Option(
            "--videos/--no-videos",
            help="Folders in a folder are videos, their images the frames.",
            show_default="no-videos",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Statistics (mu, sigma), an .npz, or a folder.",
            metavar="PATH",
            show_default="fashion-mnist for its network",
            autocompletion=completing.choices("reference"),
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="fashion-mnist, or a local Inception weights' file; nothing is downloaded.",
            metavar="FILE",
            show_default="auto",
            autocompletion=completing.choices("extractor"),
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="Inception's input: tensorflow or pytorch-fid.",
            show_default="auto",
            autocompletion=completing.choices("resize"),
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Static model or images to pair with, from the same seeds; `static` is the model's own weights, complete.",
            metavar="PATH",
            rich_help_panel=PAIRS,
            autocompletion=completing.choices("against"),
        ),
    ] = None,
    yardstick_images: Annotated[
        int | None,
        typer.Option(help="Pairs of each yardstick.", show_default="256", rich_help_panel=PAIRS),
    ] = None,
    lpips: Annotated[
        str | None,
        typer.Option(help="Folder with LPIPS weights.", metavar="FOLDER", rich_help_panel=PAIRS),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Folder of a CLIP model.", metavar="FOLDER", rich_help_panel=PAIRS)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="A line a class or image.", metavar="FILE", rich_help_panel=PAIRS),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 if it holds: psnr<25, ssim.worst<0.8, frechet>30. May be repeated.",
            metavar="CONDITION",
            show_default=False,
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            help="Images to draw, or to take of a folder.", show_default="1000 of a model, all of a folder"
        ),
    ] = None,
    classes: Annotated[str | None, options.classes(rich_help_panel=SAMPLING)] = None,
    seed: Annotated[int | None, options.image_seed(rich_help_panel=SAMPLING)] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="As in dydit sample.",
            show_default="ddpm or euler",
            rich_help_panel=SAMPLING,
            autocompletion=completing.choices("sampler"),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of the sampler.", show_default="50", rich_help_panel=SAMPLING),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance.", show_default="1.5", rich_help_panel=SAMPLING),
    ] = None,
    execution: Annotated[str | None, options.execution(rich_help_panel=SAMPLING)] = None,
    keep_bias: Annotated[float | None, options.keep_bias(rich_help_panel=SAMPLING)] = None,
    budget: Annotated[float | None, options.budget(rich_help_panel=SAMPLING)] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Local AutoencoderKL, for latent models.", metavar="FOLDER", rich_help_panel=SAMPLING
        ),
    ] = None,
    device: Annotated[str | None, options.device(rich_help_panel=SAMPLING)] = None,
    dtype: Annotated[str | None, options.dtype(rich_help_panel=SAMPLING)] = None,
    batch_size: Annotated[int | None, options.batch_size(rich_help_panel=SAMPLING)] = None,
    processes: Annotated[int | None, options.processes(rich_help_panel=SAMPLING)] = None,
    statistics: Annotated[
        bool | None,
        typer.Option(
            "--statistics/--no-statistics",
            help="Also write the samples' mu and sigma, as a reference for others.",
            show_default="no-statistics",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; `dydit compare` reads it.")] = None,
    overwrite: options.Overwrite = None,
    dry_run: options.DryRun = False,
    json: options.AsJson = False,
) -> None:
    """Measure how good samples are, and with --against how near a dynamic model stays to its static one.

    Fréchet distance, sFID, KID, inception score, precision and recall, with intervals, from a small Fashion-MNIST network that is
    shipped, or from a local file of Inception weights. With --against: PSNR, SSIM (LPIPS, CLIP score) of pairs from the same
    seeds, beside two yardsticks, and sheets of the worst and the median pairs.
    """
    from dydit_cli.recipe.schema import EvaluateSection

    _take_subject(context)
    # An option that may be repeated is an empty list when it is not given.
    context.params["fail_if"] = context.params["fail_if"] or None
    request = stage.resolve(context, EvaluateSection)
    if dry_run:
        foresight.show(_foreseen(request.section), context, request.recipe.to_yaml(), as_json=json)
        return
    run_in_processes(context, request.section.processes)
    evaluated = evaluate_with_progress(request.section, request.recipe.to_yaml())
    cost = evaluated.report.cost
    if cost is not None:
        warn_if_hardly_cheaper(cost.ratio.value, request.section.model, request.section.execution)
    if json:
        console.emit_json(evaluated.report.to_json())
    else:
        _print(evaluated, request.section)
    _fail(evaluated)


def evaluate_with_progress(section: EvaluateSection, recipe_yaml: str | None = None) -> Evaluated:
    """Run an evaluation with a progress bar on stderr."""
    from dydit_cli.evaluation.evaluate import evaluate as run

    with _progress() as on_progress:
        return run(
            str(section.samples or section.model),
            settings_of(section),
            out=section.out,
            overwrite=section.overwrite,
            recipe_yaml=recipe_yaml,
            on_progress=on_progress,
        )


def settings_of(section: EvaluateSection) -> EvaluationSettings:
    """A recipe's section as the evaluation takes it."""
    from dydit_cli.evaluation.inputs.model import SamplingSettings
    from dydit_cli.evaluation.settings import EvaluationSettings

    sampling = SamplingSettings(
        num_images=section.num_images or DEFAULT_IMAGES,
        classes=section.classes,
        steps=section.steps,
        guidance=section.guidance,
        guidance_channels=section.guidance_channels,
        sampler=section.sampler,
        seed=section.seed,
        batch_size=section.batch_size,
        execution=section.execution,
        keep_bias=section.keep_bias,
        budget=section.budget,
        vae=section.vae,
        device=section.device,
        dtype=section.dtype,
    )
    return EvaluationSettings(
        sampling=sampling,
        limit=section.num_images,
        videos=section.videos,
        reference=section.reference,
        extractor=section.extractor,
        resize=section.resize,
        against=section.against,
        yardstick_images=section.yardstick_images,
        lpips=section.lpips,
        clip=section.clip,
        prompts=section.prompts,
        processes=section.processes,
        statistics=section.statistics,
        fail_if=section.fail_if or (),
    )


def _foreseen(section: EvaluateSection) -> foresight.Foresight:
    """What `--dry-run` shows: all is opened, and nothing is sampled."""
    from dydit_cli.evaluation.foresight import foresee

    with _progress():
        seen = foresee(
            str(section.samples or section.model),
            settings_of(section),
            out=section.out,
            overwrite=section.overwrite,
        )
    count = f"{seen.images:,} {'videos' if section.videos else 'images'}"
    reads = [(seen.kind, f"{seen.subject}, {count} {'drawn' if seen.kind == 'model' else 'read'}")]
    if seen.against is not None:
        reads.append(("against", f"{seen.against}, image by image"))
    if seen.reference is not None:
        reads.append(("reference", seen.reference))
    makes = [("measures", ", ".join(seen.measures))]
    makes += [("with", seen.extractor)] if seen.extractor is not None else []
    if seen.sampling is not None:
        makes += [("sampling", seen.sampling), ("runs on", seen.device)]
    return foresight.Foresight(reads=reads, makes=makes, out=section.out, nbytes=None, facts=seen.as_json())


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for each thing that is done."""
    with progress_bar() as progress:
        tasks = {"": progress.add_task("loading", total=None)}

        def tell(what: str, done: float, total: int) -> None:
            if what not in tasks:
                progress.update(tasks[""], visible=False)
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield tell


def _take_subject(context: typer.Context) -> None:
    """Turn an argument that is a model, a folder or an archive into the option that it stands for."""
    from dydit_cli.evaluation.inputs.kinds import is_model

    arguments = list(context.params.get("arguments") or ())
    named = [
        each
        for each in arguments
        if Path(each).expanduser().is_dir() or (each.endswith(".npz") and not stage.is_override(each))
    ]
    if not named:
        return
    given = [f"--{key}" for key in ("model", "samples") if context.params.get(key) is not None]
    if len(named) > 1 or given:
        raise DyditError(
            f"More than one thing is to be evaluated: {' and '.join([*named, *given])}.",
            why="An evaluation has one subject; what it is compared with is given as --against or --reference.",
            fix="Name one; `dydit compare` sets finished evaluations side by side.",
        )
    context.params["model" if is_model(Path(named[0]).expanduser()) else "samples"] = named[0]
    context.params["arguments"] = [each for each in arguments if each != named[0]]


def _print(evaluated: Evaluated, section: EvaluateSection) -> None:
    from dydit_cli.cli.evaluation_tables import facts_table, metrics_table, pairs_table

    report, results = evaluated.report, console.results()
    results.print(facts_table(report))
    if report.metrics:
        results.print()
        results.print(metrics_table(report))
    if report.pairs is not None:
        results.print()
        results.print(pairs_table(report.pairs))
    for name, why in report.missing.items():
        console.note(f"not measured: {name.replace('_', ' ')} ({why})", style="dim")
    for name, why in (report.pairs.missing if report.pairs else {}).items():
        console.note(f"not measured: the yardstick '{name}' ({why})", style="dim")
    for text in report.notes:
        console.warn(text)
    if section.out is None:
        console.note(
            "nothing was written; pass --out FOLDER to keep it, and `dydit compare FOLDER` to compare."
        )
    else:
        console.say(f"Written to {section.out}: {', '.join(report.files)}")
        console.note(
            f"next: dydit compare {quoted(section.out)}   beside others: dydit compare FOLDER FOLDER"
        )


def _fail(evaluated: Evaluated) -> None:
    """Leave with exit code 1 if a condition holds."""
    if not evaluated.failures:
        return
    for condition, value in evaluated.failures:
        console.note(
            f"failed: {condition.key} is {value:.4g}, and the condition is {condition.text}", style="bold red"
        )
    raise typer.Exit(FAILED)
