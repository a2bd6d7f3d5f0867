"""`dydit plan`: what converting and fine-tuning a checkpoint takes, from its header alone, or what the run of a recipe takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, options, stage
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.conversion.pricing import Price

EXAMPLES = (
    "dydit plan flux1-dev.safetensors",
    "dydit plan flux1-dev.safetensors --target-ratio 0.7 --json",
    "dydit plan DiT-XL-2-256x256.pt --family dit",
    "dydit plan black-forest-labs/FLUX.1-schnell",
    "dydit plan dit-xl-2-256/full batch_size=64",
    "dydit plan mine.yaml --json",
)


def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE | NAME | RECIPE [KEY=VALUE]",
            help="A checkpoint (.pt, .safetensors, folder, builtin:NAME, or owner/name of the Hub), or a recipe (a YAML file or a built-in "
            "name) with changes to it.",
            show_default=False,
            autocompletion=completing.recipes,
        ),
    ],
    family: Annotated[
        str, typer.Option(help="Name of the family, or auto.", autocompletion=completing.choices("family"))
    ] = "auto",
    target_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of attention and MLP MACs that fine-tuning is to leave.", show_default="0.5"
        ),
    ] = None,
    num_heads: options.NumHeads = None,
    num_groups: options.NumGroups = None,
    axes_dims_rope: options.AxesDimsRope = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Recipe: the model's published size, where its checkpoint is not here.",
            metavar="NAME",
            autocompletion=completing.choices("preset"),
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Recipe: where it would train.",
            show_default="the recipe's",
            autocompletion=completing.choices("device"),
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Recipe: make a few steps to see how long they take."),
    ] = True,
    json: options.AsJson = False,
) -> None:
    """Price a conversion, or the run of a recipe, before it is started.

    Of a checkpoint, reads names and shapes, no weights, also of one on the Hub: seconds for a file of any size.
    Prints the parameters that routers add, the multiply-accumulates at the target ratio, and what conversion and
    fine-tuning take of disk and memory.

    Of a recipe, prints what its fine-tuning trains, needs of memory and disk, and how long it takes: from two steps made
    here where they can be made, and else from an estimate that says so.
    """
    recipe, overrides = stage.split_arguments(arguments)
    if recipe is not None and _is_recipe(recipe):
        from dydit_cli.cli.plan_recipe import plan_recipe

        given = {"target_ratio": target_ratio, "device": device}
        plan_recipe(recipe, overrides, given, preset=preset, measure=measure, as_json=json)
        return
    checkpoint = _checkpoint(recipe, overrides)
    hints = (num_heads, num_groups, _numbers(axes_dims_rope))
    found = price_of(checkpoint, family, hints, target_ratio)
    if json:
        console.emit_json(found.as_json())
        return
    console.results().print(table(found))
    console.note(
        "Memory is that of weights, gradients, optimiser and moving average; activations come on top."
    )
    if not found.dynamic:
        console.note(
            f"next: dydit convert --checkpoint {quoted(checkpoint)} --family {found.family} --out runs/c"
        )


def price_of(
    checkpoint: str,
    family: str,
    hints: tuple[int | None, int | None, tuple[int, ...] | None],
    ratio: float | None,
) -> Price:
    """Price a checkpoint by its path, ``builtin:NAME``, or repository of the Hub, of which headers alone are fetched.

    Args:
        checkpoint: As `dydit convert` takes it.
        family: Name of the family, or auto.
        hints: Heads, channel groups and rotary axes, where they are given.
        ratio: Target of fine-tuning.
    """
    from dydit_cli.checkpoints import open_checkpoint
    from dydit_cli.checkpoints.builtin import PREFIX, builtin_models
    from dydit_cli.checkpoints.locating import glimpsed
    from dydit_cli.conversion.pricing import price
    from dydit_cli.families.family import Hints

    heads, groups, axes = hints
    sizes: dict[str, int] = {}
    if checkpoint.startswith(PREFIX):
        facts = builtin_models().get(checkpoint.removeprefix(PREFIX)) or {}
        config = facts.get("config")
        said = config if isinstance(config, dict) else {}
        heads = heads or said.get("num_heads")
        axes = axes or (tuple(said["axes_dims_rope"]) if "axes_dims_rope" in said else None)
        family = str(facts.get("family", family)) if family == "auto" else family
        sizes = {name: said[name] for name in ("sample_size", "text_tokens") if name in said}
    with glimpsed(checkpoint, console.note) as path:
        found = price(
            open_checkpoint(path), family=family, hints=Hints(heads, groups, axes), ratio=ratio, sizes=sizes
        )
    return replace(found, path=checkpoint)


def _is_recipe(name: str) -> bool:
    """Whether an argument means a recipe: a YAML file, or a built-in name that is no path here."""
    if name.endswith((".yaml", ".yml")):
        return True
    from dydit_cli.recipe.builtin import builtin_recipes

    return not Path(name).exists() and name in {recipe.name for recipe in builtin_recipes()}


def _checkpoint(name: str | None, overrides: list[str]) -> str:
    """The checkpoint that is meant.

    Raises:
        DyditError: If there are keys of a recipe and no recipe.
    """
    from dydit_cli.errors import DyditError

    if name is None or overrides:
        raise DyditError(
            f"{' '.join(overrides)} belongs to no recipe.",
            why="Keys change a recipe, which was not named.",
            fix="Name a recipe before them, as in `dydit plan dit-xl-2-256/full batch_size=64`.",
        )
    _refuse_near_recipe(name)
    return name


def _refuse_near_recipe(name: str) -> None:
    """A slip in a recipe's name is not looked for on the Hub.

    Raises:
        DyditError: With the name that is meant.
    """
    from difflib import get_close_matches

    from dydit_cli.checkpoints.hub import EXPLICIT, is_repository
    from dydit_cli.errors import DyditError
    from dydit_cli.recipe.builtin import builtin_recipes

    if name.startswith(EXPLICIT) or not is_repository(name):
        return
    near = get_close_matches(name, [recipe.name for recipe in builtin_recipes()], n=1, cutoff=0.8)
    if near:
        raise DyditError(
            f"There is neither a checkpoint nor a recipe called {name}.",
            why="No file or folder is called so, and no built-in recipe.",
            fix=f"did you mean '{near[0]}'? A repository of the Hub is named {EXPLICIT}{name}.",
        )


def table(found: Price) -> Table:
    """The figures, one a line."""
    from rich.table import Table

    params, gmacs, sizes = found.params, found.gmacs, found.bytes
    rows = [
        ("model", model_words(found)),
        (
            "units",
            f"{found.geometry['num_heads']} heads and {found.geometry['num_groups']} channel groups a block",
        ),
        ("input", _input(found)),
        (
            "parameters",
            f"{params['static']:,} + {params['routers']:,} of routers (+{params['routers'] / params['static']:.2%})",
        ),
        ("forward pass", f"{_count(gmacs.static)} GMACs of the static model"),
        (
            f"at ratio {gmacs.ratio:g}",
            f"{_count(gmacs.dynamic)} GMACs, {_count(gmacs.routers)} of them for routers ({gmacs.dynamic / gmacs.static:.1%} of "
            f"the static model); the lowest target is {gmacs.ratio_floor:.3f}",
        ),
        (
            "disk",
            f"{size(sizes.source)} of weights read, {size(sizes.converted)} written by dydit convert",
        ),
        ("memory to convert", f"about {size(sizes.convert_memory)} beside the libraries, tensor by tensor"),
        ("memory to fine-tune", f"{size(sizes.train_full)} for all parameters"),
        (
            "with TD-LoRA",
            f"{size(sizes.train_adapter)}, {params['adapter']:,} parameters "
            f"({params['adapter'] / params['static']:.2%}) and the routers train",
        ),
    ]
    if sizes.caption:
        rows.append(
            (
                "prepared data",
                f"{size(sizes.caption)} a caption and {size(sizes.sample)} an image in fp32; "
                f"1,000 captions take {size(1000 * sizes.caption)}, half of that in bf16",
            )
        )
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    return grid


def model_words(found: Price) -> str:
    """Family and size of a checkpoint."""
    stored = f", stored as {found.quantisation}" if found.quantisation else ""
    return f"{found.family}, {_blocks(found)} of {found.geometry['hidden_size']} channels{stored}"


def _blocks(found: Price) -> str:
    double = found.geometry.get("num_double")
    if double is None:
        return f"{found.geometry['depth']} blocks"
    return f"{double} + {found.geometry['depth'] - double} blocks"


def _input(found: Price) -> str:
    geometry = found.geometry
    text = f" and {geometry['text_tokens']} of text" if geometry.get("text_tokens") else ""
    return (
        f"{geometry['in_channels']} x {geometry['sample_size']} x {geometry['sample_size']}, "
        f"{geometry['num_tokens']:,} tokens{text}"
    )


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in the unit of disks and hubs: powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    from dydit_cli.errors import DyditError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DyditError(
            f"'{text}' is no list of numbers.",
            why="The channels of a head on each of three rotary axes are expected.",
            fix="Write it like --axes-dims-rope 16,56,56.",
        ) from error
