"""`dydit export`: take a model elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, foresight, options, stage
from dydit_cli.cli.standing import warn_if_hardly_cheaper
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.export.export import ExportReport
    from dydit_cli.export.publish import Destination
    from dydit_cli.recipe.schema import ExportSection

EXAMPLES = (
    "dydit export --model runs/t --format diffusers --out runs/e",
    "dydit export --model runs/t --format diffusers --vae sd-vae-ft-ema --dtype bfloat16 --out runs/e",
    "dydit export --model runs/c --format static --out runs/static",
    "dydit export --model runs/flux --pipeline FLUX.1-dev --out runs/e",
    "dydit export --model runs/t --format baked --steps 20 --out runs/baked",
    "dydit export --model runs/t --format pruned --timestep 500 --out runs/pruned",
    "dydit export --model runs/t --format torch-export --out runs/program",
    "dydit export --model runs/t --format onnx --steps 20 --out runs/graph",
    "dydit export --model runs/flux --format comfyui --out runs/flux-comfyui",
    "dydit export --model runs/t --measured runs/profile,runs/eval --push-to-hub yourname/dit-dynamic --out runs/e",
)

FILES_SHOWN = 12

CARD = "Card and upload"

STATIC = ("static", "pruned")
"""Formats of models that decide nothing."""

UNTRAINED_RATIO = 1.0


def export(
    context: typer.Context,
    arguments: options.RecipeArguments = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of dydit convert or dydit finetune.", metavar="DIR")
    ] = None,
    format: Annotated[  # noqa: A002 (the key is called so)
        str | None,
        typer.Option(
            help="diffusers (a pipeline folder), original (one file, with routers), static (the complete model again), baked (a "
            "pipeline folder with the widths of one schedule), pruned (the static model of one timestep's width), torch-export, "
            "onnx or comfyui.",
            show_default="diffusers",
            autocompletion=completing.choices("format"),
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
            show_default="float32; as stored (FLUX, original, static)",
            autocompletion=completing.choices("dtype"),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="baked, onnx: sampling steps whose widths are written down.", metavar="N", show_default="50"
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="baked, onnx: sampler of dydit sample whose timesteps they are; baked has the pipeline's own as well.",
            metavar="NAME",
            show_default="the family's first",
            autocompletion=completing.choices("sampler"),
        ),
    ] = None,
    timestep: Annotated[
        float | None,
        typer.Option(
            help="pruned: timestep whose width stays, as the family counts (DiT: 999 is noise; SiT: 0 is).",
            metavar="T",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Ratio that the pipeline runs at, of a model trained for a range of them."),
    ] = None,
    license: Annotated[  # noqa: A002 (the key is called so)
        str | None,
        typer.Option(
            help="What the model card states: an identifier such as cc-by-nc-4.0, or a name.",
            metavar="ID",
            show_default="the base model's, where its files tell",
            rich_help_panel=CARD,
        ),
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option(
            help="Folders of dydit profile and dydit evaluate whose results the card shows.",
            metavar="DIR,DIR,…",
            rich_help_panel=CARD,
        ),
    ] = None,
    push_to_hub: Annotated[
        str,
        typer.Option(
            help="Upload the finished export to a new repository of the Hub; --overwrite: to one that exists.",
            metavar="OWNER/NAME",
            show_default=False,
            rich_help_panel=CARD,
        ),
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository a private one.", rich_help_panel=CARD)
    ] = False,
    out: options.Out = None,
    overwrite: options.Overwrite = None,
    dry_run: options.DryRun = False,
    json: options.AsJson = False,
) -> None:
    """Write a model for use elsewhere.

    A diffusers folder runs in the stock DiTPipeline (FLUX: FluxPipeline), with or without dydit; its model card shows the code. So do
    baked and pruned ones: baked has no width routers and serves one schedule, pruned is static. The formats original and static are
    one file in the layout of the original repository, or the static folder that a FLUX was converted from.
    """
    from dydit_cli.recipe.schema import ExportSection

    request = stage.resolve(context, ExportSection)
    _check_destination(push_to_hub, private)
    if dry_run:
        seen = _foreseen(request.section, push_to_hub)
        foresight.show(seen, context, request.recipe.to_yaml(), as_json=json)
        return
    destination = None
    if push_to_hub:
        from dydit_cli.export.publish import check_login

        destination = check_login(push_to_hub, private=private, overwrite=request.section.overwrite)
    report = export_with_notes(request.section, request.recipe.to_yaml())
    if report.format not in STATIC:
        warn_if_hardly_cheaper(
            UNTRAINED_RATIO if report.ratio is None else report.ratio, request.section.model
        )
    if destination is not None:
        report = replace(report, url=_published(report, destination))
    if json:
        from dataclasses import asdict

        console.emit_json(asdict(report))
        return
    console.results().print(summary(report))
    console.say(f"Written to {report.out}. {report.verified}")
    for note in report.notes:
        console.note(note)
    if report.url is not None:
        console.say(f"Uploaded to {report.url}")
        return
    console.note(f"next: {quoted(Path(report.out) / 'README.md')} shows how to load it")


def _check_destination(repository: str, private: bool) -> None:
    """See that an upload can be meant as it is given.

    Raises:
        DyditError: If the name is none, or there is nothing to be private.
    """
    from dydit_cli.errors import DyditError

    if repository:
        from dydit_cli.export.publish import check_destination

        check_destination(repository)
    elif private:
        raise DyditError(
            "--private is given, and nothing is uploaded.",
            why="It says who sees a new repository of the Hub.",
            fix="Add --push-to-hub OWNER/NAME, or leave --private out.",
        )


def _published(report: ExportReport, destination: Destination) -> str:
    """Say what is uploaded and what it replaces, upload it, and return the address."""
    from dydit_cli.cli.plan import size
    from dydit_cli.export.publish import publish, upload_list

    folder = Path(report.out)
    files = upload_list(folder)
    total = size(sum(nbytes for _, nbytes in files))
    seen_by = "its owner alone" if destination.private else "everybody"
    console.note(f"{len(files)} files, {total}, go to {destination.repository}, seen by {seen_by}:")
    for name, nbytes in files:
        console.note(f"  {name} ({size(nbytes)})")
    if destination.exists:
        console.note("other files that are there now are deleted (their older versions stay in its history)")
    if report.license in (None, "unknown"):
        console.warn(
            "the card says that the licence is unknown: nothing told that of the base model. Pass --license, or edit README.md there."
        )
    return publish(folder, destination, say=console.note)


def _foreseen(section: ExportSection, repository: str) -> foresight.Foresight:
    """What `--dry-run` shows."""
    from dydit_cli.cli.plan import size
    from dydit_cli.export.foresight import foresee

    seen = foresee(section)
    reads = [("model", f"{seen.model}, {size(seen.read_bytes)} of weights")]
    reads += [
        (name, str(value)) for name, value in (("vae", section.vae), ("pipeline", section.pipeline)) if value
    ]
    ratio = "not fine-tuned: 1" if seen.ratio is None else f"{seen.ratio:.4f}"
    return foresight.Foresight(
        reads=reads,
        makes=[
            ("format", f"{seen.format}, of a {seen.family}"),
            ("base model", seen.base or "not recorded"),
            ("ratio", f"{ratio} of attention and MLP MACs"),
            ("licence", seen.license),
            *([("uploads", f"the folder's files to {repository}")] if repository else []),
        ],
        out=section.out,
        nbytes=seen.weight_bytes + seen.part_bytes,
        exact=seen.exact,
        facts=seen.as_json() | {"push_to_hub": repository or None},
    )


def export_with_notes(section: ExportSection, recipe_yaml: str | None = None) -> ExportReport:
    """Run an export, saying on stderr what it is at."""
    from dydit_cli.export.export import export as run

    return run(section, recipe_yaml=recipe_yaml, on_progress=console.note)


def summary(report: ExportReport) -> Table:
    """The report as a table of files."""
    from rich.table import Table

    from dydit_cli.cli.plan import size

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("format", f"{report.format}, {report.dtype}")
    if report.format not in STATIC:
        realised = "1 (not fine-tuned)" if report.ratio is None else f"{report.ratio:.4f}"
        table.add_row("ratio", f"{realised} of attention and MLP MACs")
    table.add_row("licence", f"{report.license}, as the card says")
    for name, text in report.facts.items():
        table.add_row(name, text)
    for index, (name, nbytes) in enumerate(report.files.items()):
        if index == FILES_SHOWN:
            table.add_row("", f"and {len(report.files) - FILES_SHOWN} more files")
            break
        table.add_row("file" if index == 0 else "", f"{name} ({size(nbytes)})")
    return table
