"""`dydit export`: take a model elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import console, options, stage

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.export.export import ExportReport
    from dydit_cli.recipe.schema import ExportSection

EXAMPLES = (
    "dydit export --model runs/t --format diffusers --out runs/e",
    "dydit export --model runs/t --format diffusers --vae sd-vae-ft-ema --dtype bfloat16 --out runs/e",
    "dydit export --model runs/c --format static --out runs/static",
    "dydit export --model runs/flux --pipeline FLUX.1-dev --out runs/e",
)

FILES_SHOWN = 12


def export(
    context: typer.Context,
    arguments: options.RecipeArguments = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of dydit convert or dydit finetune.", metavar="DIR")
    ] = None,
    format: Annotated[  # noqa: A002 (the key is called so)
        str | None,
        typer.Option(
            help="diffusers (a pipeline folder), original (one file, with routers), or static (the complete model again).",
            show_default="diffusers",
        ),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="AutoencoderKL folder to put into the pipeline.", metavar="DIR")
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="FLUX: local pipeline folder, whose text encoders, vae and schedule go into the export.",
            metavar="DIR",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16.",
            show_default="float32 (diffusers folders but FLUX's), as stored (others)",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Ratio that the pipeline runs at, of a model trained for a range of them."),
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = None,
    json: options.AsJson = False,
) -> None:
    """Write a model for use elsewhere.

    A diffusers folder runs in the stock DiTPipeline (FLUX: FluxPipeline), with or without dydit; its model card shows the code. The
    other two formats are one file in the layout of the original repository, or the static folder that a FLUX was converted from.
    """
    from dydit_cli.recipe.schema import ExportSection

    request = stage.resolve(context, ExportSection)
    report = export_with_notes(request.section, request.recipe.to_yaml())
    if json:
        from dataclasses import asdict

        console.emit_json(asdict(report))
        return
    console.results().print(summary(report))
    console.say(f"Written to {report.out}. {verdict(report)}")
    for note in report.notes:
        console.note(note)
    console.note(f"next: {Path(report.out) / 'README.md'} shows how to load it.")


def export_with_notes(section: ExportSection, recipe_yaml: str | None = None) -> ExportReport:
    """Run an export, saying on stderr what it is at."""
    from dydit_cli.export.export import export as run

    return run(section, recipe_yaml=recipe_yaml, on_progress=console.note)


def summary(report: ExportReport) -> Table:
    """The report as a table of files."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("format", f"{report.format}, {report.dtype}")
    for index, (name, size) in enumerate(report.files.items()):
        if index == FILES_SHOWN:
            table.add_row("", f"and {len(report.files) - FILES_SHOWN} more files")
            break
        table.add_row("file" if index == 0 else "", f"{name} ({size / 1e6:,.2f} MB)")
    return table


def verdict(report: ExportReport) -> str:
    """What was verified."""
    if report.format == "diffusers":
        return f"Loaded with its own code, it differs from the model by at most {report.max_difference:.1e}."
    return "Read back, every tensor is bit for bit what was meant."
