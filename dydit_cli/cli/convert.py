"""`dydit convert`: make a static checkpoint dynamic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, foresight, options, stage
from dydit_cli.cli.progress import progress_bar
from dydit_cli.cli.standing import beside, next_stage
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.conversion.convert import ConversionReport
    from dydit_cli.conversion.pricing import Price
    from dydit_cli.recipe.loading import Recipe
    from dydit_cli.recipe.schema import ConvertSection

EXAMPLES = (
    "dydit convert --checkpoint builtin:dit_fmnist --out runs/c",
    "dydit convert --checkpoint DiT-XL-2-256x256.pt --family dit --out runs/c",
    "dydit convert --checkpoint facebook/DiT-XL-2-256 --out runs/c",
    "dydit convert dit-xl-2-256/full checkpoint=DiT-XL-2-256x256.pt",
    "dydit convert --checkpoint builtin:dit_fmnist --calibrate fashion-mnist-subset --calibrate-ratio 0.8 --out runs/c",
    "dydit convert --checkpoint builtin:dit_fmnist --prune 0.5 --importance magnitude --out runs/pruned",
)

PATCHES = "x_embedder.proj.weight"
SHIPPED_DATA = {
    "builtin:dit_fmnist": "fashion-mnist-subset",
    "builtin:dit_fmnist_long": "fashion-mnist-subset",
    "builtin:sit_fmnist": "fashion-mnist-subset",
    "builtin:sit_fmnist_long": "fashion-mnist-subset",
    "builtin:latte_fmnist": "moving-fashion-mnist",
}
"""Data of the package that fit its models."""

SHIPPED_TEXTS = {
    "builtin:flux_fmnist": f"--data fashion-mnist-subset --pipeline builtin:flux_fmnist --caption {quoted('a {class}')} --resolution 28"
}
"""What makes them ready for a model that reads prompts."""

RATIO_TOLERANCE = 0.01
"""By which a calibrated model may miss its ratio without a word."""


def convert(
    context: typer.Context,
    arguments: options.RecipeArguments = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="File (.pt, .safetensors), folder, builtin:NAME, or a repository of the Hub (owner/name).",
            metavar="FILE|DIR|NAME",
            autocompletion=completing.builtin_checkpoints,
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="dit, sit, latte, latte-t2v, flux, or auto.",
            show_default="auto",
            autocompletion=completing.choices("family"),
        ),
    ] = None,
    num_heads: options.NumHeads = None,
    num_groups: options.NumGroups = None,
    grouping: Annotated[
        str | None,
        typer.Option(
            help="sorted or contiguous channel groups.",
            show_default="sorted",
            autocompletion=completing.choices("grouping"),
        ),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(
            help="free masks of heads and groups, or ordered ones.",
            show_default="free",
            autocompletion=completing.choices("width"),
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="FLUX: adapters to merge before the ranking.", metavar="FILE:SCALE,…", show_default="none"
        ),
    ] = None,
    axes_dims_rope: options.AxesDimsRope = None,
    prune: Annotated[
        float | None,
        typer.Option(
            help="A static baseline instead: cut units out for good, until this share of attention and MLP MACs is left.",
            show_default="none",
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help="magnitude, taylor, random, or scores of an earlier conversion; auto: magnitude, or taylor with --calibrate.",
            show_default="auto",
            autocompletion=completing.choices("importance"),
        ),
    ] = None,
    importance_samples: Annotated[
        int | None, typer.Option(help="Samples of the Taylor ranking.", show_default="256")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Training data, for the Taylor ranking alone.", autocompletion=completing.choices("data")
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Training data on which the widths are set before any training: each range of timesteps keeps what it needs.",
            metavar="DATA",
            show_default="none",
            autocompletion=completing.choices("calibrate"),
        ),
    ] = None,
    calibrate_ratio: Annotated[
        float | None,
        typer.Option(help="Share of attention and MLP MACs that they leave.", show_default="0.8"),
    ] = None,
    calibrate_samples: Annotated[
        int | None, typer.Option(help="Samples of each round of that measurement.", show_default="128")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of routers and rankings.", show_default="0")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the Taylor ranking and the calibration run.",
            show_default="auto",
            autocompletion=completing.choices("device"),
        ),
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = None,
    dry_run: options.DryRun = False,
    json: options.AsJson = False,
) -> None:
    """Make a trained static DiT, SiT, Latte or FLUX dynamic.

    Ranks heads and MLP channels, inserts routers that start with everything switched on, and verifies that the result computes
    what the checkpoint computes. The authors' dynamic DiT files are imported as they are.
    """
    from dydit_cli.families.registry import family_named
    from dydit_cli.recipe.schema import ConvertSection

    request = stage.resolve(context, ConvertSection)
    if dry_run:
        foresight.show(_foreseen(request.section), context, request.recipe.to_yaml(), as_json=json)
        return
    report = convert_with_progress(request.section, request.recipe.to_yaml())
    if json:
        from dataclasses import asdict

        console.emit_json(asdict(report))
        return
    console.results().print(summary(report))
    if report.pruning is not None:
        check = report.verification
        console.say(
            f"Written to {report.out}. Largest difference from the source with these units multiplied by zero: "
            f"{max(check.dense or 0.0, check.compact or 0.0):.1e} (fp32, relative to the output)."
        )
        console.note(
            "The model is static, and smaller for good: what was cut out is gone. Fine-tuning lets the rest make up for it."
        )
        console.note(f"next: {next_command(report, request.section, request.recipe)}")
        return
    console.say(f"Written to {report.out}. Largest difference from the source: {_difference(report)}.")
    if report.calibration is not None:
        show_calibration(report)
        console.note(
            f"next: {next_command(report, request.section, request.recipe)}   or at once: dydit sample --model {quoted(report.out)} "
            f"--out {beside(report.out, 'samples')}"
        )
        return
    if report.importance == "imported":
        console.note("The file's trained routers were kept; the model is dynamic already.")
        console.note(f"next: dydit profile --model {quoted(report.out)}")
        return
    if report.verification.switched_on is not None and report.verification.switched_on < 1:
        console.warn(
            f"the routers start with as little as {report.verification.switched_on:.1%} switched on: this model's activations outweigh "
            "the paper's starting biases. Fine-tuning begins slightly below the complete model; another --seed may start at 100 %."
        )
    missing = family_named(report.family).missing
    if "dydit finetune" in missing:
        console.note("The model is not faster yet: every router starts with everything on.")
        console.note(f"next: {missing['dydit sample']}")
        return
    if "text_tokens" in report.geometry:
        console.note(
            "The model is not faster yet: every router starts with everything on. Fine-tuning teaches them what to leave out."
        )
        console.note(f"next: {next_command(report, request.section, request.recipe)}")
        return
    console.note(
        "The model is not faster yet: every router starts with everything on. Fine-tuning teaches them what to leave out; "
        "the paper trains DiT-S/2 for 50,000, DiT-B/2 for 100,000 and DiT-XL/2 for 150,000 to 200,000 steps of 256."
    )
    console.note(f"next: {next_command(report, request.section, request.recipe)}")


def _foreseen(section: ConvertSection) -> foresight.Foresight:
    """What `--dry-run` shows.

    Raises:
        DyditError: For whatever would end the conversion before it computes anything.
    """
    from dydit_cli.artifacts.writing import refuse_existing
    from dydit_cli.cli.plan import model_words, price_of, size
    from dydit_cli.devices import find_device

    refuse_existing(section.out, section.overwrite)
    device = find_device(section.device)
    with progress_bar() as progress:
        progress.add_task("reading the header", total=None)
        found = price_of(
            section.checkpoint,
            section.family,
            (section.num_heads, section.num_groups, section.axes_dims_rope),
            None,
        )
    reads = [("checkpoint", f"{section.checkpoint}, {size(found.bytes.source)} of weights")]
    reads += [("adapter", lora) for lora in section.lora or ()]
    for use, data in (("ranking", section.data), ("calibration", section.calibrate)):
        if data is not None:
            reads.append((f"data of the {use}", f"{data}, {_count_samples(data, found):,} samples"))
    makes = [("model", model_words(found)), ("ranking", section.importance)]
    if section.prune is not None:
        makes.append(("pruned to", f"{section.prune:g} of attention and MLP MACs"))
    if section.calibrate is not None:
        makes.append(("calibrated to", f"{section.calibrate_ratio:g} of attention and MLP MACs, on {device}"))
    measured = section.prune is None and section.calibrate is None and section.importance != "taylor"
    return foresight.Foresight(
        reads=reads,
        makes=makes,
        out=section.out,
        nbytes=found.bytes.converted,
        exact=section.prune is None,
        memory=found.bytes.convert_memory if measured else None,
        facts={"checkpoint": found.as_json(), "dynamic": found.dynamic},
    )


def _count_samples(data: str, found: Price) -> int:
    """How many samples data hold that fit the model of a checkpoint.

    Raises:
        DyditError: If there are none, or they do not fit.
    """
    import torch

    from dydit_cli.data import open_data
    from dydit_cli.families.registry import family_named

    with torch.device("meta"):
        geometry = family_named(found.family).model_class(**found.config).geometry
    return len(open_data(data, geometry=geometry).train)


def next_command(report: ConversionReport, section: ConvertSection, recipe: Recipe | None = None) -> str:
    """The command that goes on from a conversion: the recipe's own next stage, or a fine-tuning with what is known."""
    if following := next_stage(recipe, report.out, ("prepare", "finetune")):
        return following
    data = section.calibrate or section.data or SHIPPED_DATA.get(section.checkpoint)
    target = 0.5
    if report.pruning is not None:
        target = 1.0
    elif report.calibration is not None:
        target = report.calibration.target_ratio
    cache = beside(report.out, "cache")
    before = ""
    if "text_tokens" in report.geometry and data is None:
        what = SHIPPED_TEXTS.get(
            section.checkpoint, "--prompts PROMPTS --count 2000 --pipeline PIPELINE --resolution 1024"
        )
        before = f"dydit prepare {what} --out {cache}   and then: "
    # The defaults' ramp alone is longer than what a small model needs.
    shipped = section.checkpoint in (*SHIPPED_DATA, *SHIPPED_TEXTS)
    recipe_name = f"demo/fashion-mnist-{report.family} " if shipped else ""
    size = "" if shipped else " --steps 50000 --batch-size 256"
    where = quoted(data) if data is not None else cache if before else "DATA"
    return (
        f"{before}dydit finetune {recipe_name}--model {quoted(report.out)} --data {where} --target-ratio {target:g}{size} --out "
        f"{beside(report.out, 'finetuned')}"
    )


def show_calibration(report: ConversionReport) -> None:
    """Print what each range of timesteps keeps, what it costs in loss, and what to do next."""
    from dydit_cli.cli.calibration_table import calibration_table

    made = report.calibration
    if made is None:
        raise TypeError("the report is of a conversion without calibration")
    console.results().print(calibration_table(made))
    console.say(
        f"Without any training, at {made.ratio:.3f} of the attention and MLP MACs: held-out loss {made.loss:.5f}, that of the static "
        f"model {made.static_loss:.5f} ({made.loss / made.static_loss - 1:+.1%}; the same {made.held_out_images} samples, timesteps and "
        "noise)."
    )
    if abs(made.ratio - made.target_ratio) > RATIO_TOLERANCE:
        console.warn(
            f"the routers realise {made.ratio:.3f} and not the {made.target_ratio:g} asked for; try another --calibrate-ratio."
        )
    console.note(
        f"Fine-tuning joins its schedule where the target is {made.ratio:.2f}: no step is spent on the complete model, and the rest of "
        "the ramp leads from there to --target-ratio."
    )


def convert_with_progress(section: ConvertSection, recipe_yaml: str | None = None) -> ConversionReport:
    """Run a conversion with a progress line on stderr; asks at a terminal for what the file cannot say."""
    from dydit_cli.conversion.convert import convert as run

    settings = section.model_dump(exclude={"family", "num_heads"})
    settings["lora"] = settings["lora"] or ()
    family, num_heads = ask_what_the_file_cannot_say(section)
    with progress_bar() as progress:
        task = progress.add_task("reading the checkpoint", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total if total > 1 else None)

        return run(family=family, num_heads=num_heads, recipe_yaml=recipe_yaml, on_progress=show, **settings)


def ask_what_the_file_cannot_say(section: ConvertSection) -> tuple[str, int | None]:
    """Return family and heads, asked for where a person sits at the terminal and the file leaves them open."""
    from dydit_cli.checkpoints import open_checkpoint
    from dydit_cli.checkpoints.builtin import PREFIX
    from dydit_cli.checkpoints.locating import located
    from dydit_cli.conversion.convert import candidate_families
    from dydit_cli.families.original_dit import HEADS_BY_WIDTH

    family: str = section.family
    heads = section.num_heads
    settled = family != "auto" and heads is not None
    if settled or section.checkpoint.startswith(PREFIX) or not console.can_ask():
        return family, heads
    read = open_checkpoint(located(section.checkpoint, console.note))
    candidates = [candidate.name for candidate in candidate_families(read)]
    if family == "auto" and len(candidates) > 1:
        family = console.ask("The file could be any of these; which was it trained as?", candidates) or family
    # Only files in DiT's layout leave the heads open.
    if heads is None and candidates and PATCHES in read.tensors:
        width = read.tensors[PATCHES].shape[0]
        if width not in HEADS_BY_WIDTH:
            divisors = [str(count) for count in range(1, 65) if width % count == 0]
            answer = console.ask(
                f"How many attention heads has it? (its {width} channels do not tell)", divisors
            )
            heads = int(answer) if answer else None
    return family, heads


def summary(report: ConversionReport) -> Table:
    """The report as a table."""
    from rich.table import Table

    geometry = report.geometry
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "model", f"{report.family}, {geometry['depth']} blocks of {geometry['hidden_size']} channels"
    )
    pruning = report.pruning
    table.add_row(
        "units",
        f"{geometry['num_heads']} heads and {geometry['num_groups']} channel groups a block"
        if pruning is None
        else f"{_range([len(kept) for kept in pruning.heads])} of {geometry['num_heads']} heads and {_range(pruning.hidden)} of "
        f"{geometry['mlp_hidden']} hidden channels a block",
    )
    table.add_row(
        "input",
        (f"{geometry['num_frames']} frames of " if geometry.get("num_frames") else "")
        + f"{geometry['in_channels']} x {geometry['sample_size']} x {geometry['sample_size']}, "
        f"{geometry['num_tokens']} tokens, "
        + (
            f"{geometry['text_tokens']} of text"
            if "text_tokens" in geometry
            else f"{geometry['num_classes']} classes"
        ),
    )
    for lora in report.loras:
        table.add_row("merged", f"{lora['path']} x {lora['scale']:g} into {lora['layers']} layers")
    if pruning is not None:
        share = report.params["static"] / pruning.source_params
        table.add_row("parameters", f"{report.params['static']:,} ({share:.1%} of {pruning.source_params:,})")
        table.add_row(
            "cost",
            f"{report.static_gmacs:.4g} of {pruning.source_gmacs:.4g} GMACs a forward pass; {pruning.ratio:.4f} of attention and MLP",
        )
        table.add_row("ranking", f"{report.importance}, inside each block")
        return table
    added = report.params["routers"] / report.params["static"]
    table.add_row(
        "parameters", f"{report.params['static']:,} + {report.params['routers']:,} of routers (+{added:.2%})"
    )
    cost = f"{report.static_gmacs:,.0f}" if report.static_gmacs >= 1000 else f"{report.static_gmacs:.4g}"
    table.add_row("static cost", f"{cost} GMACs a forward pass (the paper's FLOPs are MACs)")
    table.add_row("ranking", report.importance)
    table.add_row("lowest target", f"{report.ratio_floor:.3f} of attention and MLP MACs")
    return table


def _range(counts: list[int]) -> str:
    """One number where all are equal, else the least and the most."""
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _difference(report: ConversionReport) -> str:
    check = report.verification
    if check.dense is None or check.compact is None:
        return f"{check.weights:.1e} in weights (the model is too large for its outputs to be compared here)"
    return f"{check.weights:.1e} in weights, {check.dense:.1e} dense, {check.compact:.1e} compact (fp32, relative to the output)"
