"""`dydit prepare`: encode pictures and captions once, before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, foresight, options, stage
from dydit_cli.cli.progress import progress_bar
from dydit_cli.cli.stage import Request
from dydit_cli.cli.standing import beside, next_stage
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.preparation.prepare import PrepareReport
    from dydit_cli.recipe.schema import PrepareSection

EXAMPLES = (
    "dydit prepare --data photos/ --pipeline FLUX.1-dev --resolution 512,1024 --out runs/cache",
    "dydit prepare --prompts prompts.txt --count 2000 --pipeline FLUX.1-dev --resolution 1024 --out runs/cache",
    "dydit prepare --data imagenet/train --vae sd-vae-ft-ema --resolution 256 --mirror --processes 4 --out runs/cache",
    'dydit prepare --data fashion-mnist-subset --pipeline builtin:flux_fmnist --caption "a {class}" --resolution 28 --out runs/cache',
)

WHAT, HOW, PLACE = "What is prepared", "How", "Where"
SHOWN_SIZES = 8


def prepare(
    context: typer.Context,
    arguments: options.RecipeArguments = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Pictures: a folder with captions or class folders, webdataset tars, IDX files, or fashion-mnist-subset.",
            metavar="PATH|NAME",
            rich_help_panel=WHAT,
            autocompletion=completing.choices("data"),
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="No pictures: a file of prompts, one a line, from which the pipeline draws latents.",
            metavar="FILE",
            rich_help_panel=WHAT,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Latents to draw.", show_default="one a prompt", rich_help_panel=WHAT),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Most pictures, evenly taken.", show_default="all", rich_help_panel=WHAT),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option(
            help='Captions for class folders: "a photo of a {class}"; | separates several.',
            rich_help_panel=WHAT,
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Local FLUX pipeline: its text encoders and vae. Without it, class labels are stored.",
            metavar="FOLDER",
            rich_help_panel=HOW,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Local autoencoder, for class labels.", metavar="FOLDER", rich_help_panel=HOW),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(
            help="Side in pixels; of several, each picture takes the largest that it fills.",
            metavar="N,N,…",
            show_default="256",
            rich_help_panel=HOW,
        ),
    ] = None,
    buckets: Annotated[
        bool | None,
        typer.Option(
            "--buckets/--squares",
            help="Keep the shapes of captioned pictures, or cut squares.",
            show_default="buckets",
            rich_help_panel=HOW,
        ),
    ] = None,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Encode the mirrored pictures as well.",
            show_default="no-mirror",
            rich_help_panel=HOW,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of drawing.", show_default="28", rich_help_panel=HOW)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of drawing.", show_default="3.5", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of drawing.", show_default="0", rich_help_panel=HOW)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures in a forward.", show_default="8", rich_help_panel=PLACE)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes that encode pictures.", show_default="1", rich_help_panel=PLACE),
    ] = None,
    device: Annotated[str | None, options.device(rich_help_panel=PLACE)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of text encoders and stored texts.",
            show_default="float32",
            rich_help_panel=PLACE,
            autocompletion=completing.choices("dtype"),
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", rich_help_panel=PLACE)] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with an unfinished folder.",
            show_default="no-resume",
            rich_help_panel=PLACE,
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite/--no-overwrite",
            help="Replace an existing cache.",
            show_default="no-overwrite",
            rich_help_panel=PLACE,
        ),
    ] = None,
    dry_run: options.DryRun = False,
    json: options.AsJson = False,
) -> None:
    """Encode pictures and captions once, before training.

    Pictures become latents (means and log variances), captions embeddings, in shards; `dydit finetune --data` reads the folder. A
    FLUX model that learns from itself needs no pictures: --prompts lets the pipeline draw them.
    """
    from dydit_cli.recipe.schema import PrepareSection

    request = stage.resolve(context, PrepareSection)
    if dry_run:
        foresight.show(_foreseen(request.section), context, request.recipe.to_yaml(), as_json=json)
        return
    report = prepare_with_progress(request.section, request.recipe.to_yaml())
    if json:
        from dataclasses import asdict

        console.emit_json(asdict(report))
        return
    console.results().print(summary(report))
    console.say(f"Written to {report.out}.")
    if report.left_out:
        console.warn(_left_out(report.left_out, report.kind == "texts"))
    console.note(f"next: {next_command(request)}")


def _foreseen(section: PrepareSection) -> foresight.Foresight:
    """What `--dry-run` shows."""
    from dydit_cli.cli.plan import size
    from dydit_cli.preparation.foresight import foresee

    with progress_bar() as progress:
        progress.add_task("looking for pictures", total=None)
        seen = foresee(section)
    reads = [("prompts" if seen.kind == "drawings" else "pictures", seen.source)]
    if section.pipeline is not None:
        reads.append(("pipeline", f"{section.pipeline}, its text encoders and autoencoder"))
    elif section.vae is not None:
        reads.append(("autoencoder", section.vae))
    made = f"{seen.samples:,} of {seen.channels} channels" + (
        f", {seen.done:,} of them by an earlier run" if seen.done else ""
    )
    told = f"{seen.texts:,} distinct" if section.pipeline is not None else f"{len(seen.classes)} classes"
    makes = [
        ("latents", made),
        ("captions" if section.pipeline is not None else "labels", told),
        ("sizes in pixels", _sizes(seen.sizes)),
    ]
    if seen.text_bytes:
        makes.append(("of which texts", f"{size(seen.text_bytes)}, in {section.dtype}"))
    return foresight.Foresight(
        reads=reads,
        makes=makes,
        out=section.out,
        nbytes=seen.latent_bytes + seen.text_bytes,
        memory=max(seen.encoder_bytes, seen.transformer_bytes) or None,
        facts=seen.as_json(),
        warnings=[_left_out(seen.left_out, section.pipeline is not None)] if seen.left_out else [],
    )


def _left_out(count: int, texts: bool) -> str:
    return f"{count:,} pictures are left out: they have no {'caption' if texts else 'class'}, or lie beyond --limit."


def _sizes(sizes: dict[str, int]) -> str:
    """Samples by size, the commonest first."""
    told = [f"{size} ({count:,})" for size, count in sorted(sizes.items(), key=lambda item: -item[1])]
    rest = f" and {len(told) - SHOWN_SIZES} more" if len(told) > SHOWN_SIZES else ""
    return ", ".join(told[:SHOWN_SIZES]) + rest


def next_command(request: Request[PrepareSection]) -> str:
    """The command that goes on from a cache: the recipe's own next stage, or a fine-tuning on it."""
    out = request.section.out
    if following := next_stage(request.recipe, out, ("convert", "finetune")):
        return following
    return f"dydit finetune --model MODEL --data {quoted(out)} --steps 50000 --out {beside(out, 'finetuned')}"


def prepare_with_progress(section: PrepareSection, recipe_yaml: str | None = None) -> PrepareReport:
    """Run a preparation with a progress bar on stderr."""
    from dydit_cli.preparation.prepare import prepare as run

    with progress_bar() as progress:
        task = progress.add_task("preparing", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        try:
            return run(section, recipe_yaml=recipe_yaml, on_progress=show)
        except KeyboardInterrupt:
            console.note("Stopped; what is encoded stays: the same command with --resume goes on.")
            raise


def summary(report: PrepareReport) -> Table:
    """The report as a table."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    reused = f" ({report.reused:,} of them by an earlier run)" if report.reused else ""
    mirrored = ", and of their mirror images" if report.mirrored else ""
    table.add_row("latents", f"{report.samples:,} of {report.channels} channels{mirrored}{reused}")
    if report.kind == "texts":
        table.add_row("captions", f"{report.texts:,} distinct")
    else:
        table.add_row("classes", f"{len(report.classes)}")
    table.add_row("sizes in pixels", _sizes(report.sizes))
    table.add_row("on disk", f"{report.nbytes / 1e6:,.1f} MB")
    return table
