"""`dydit recipes`: list, show, copy and validate recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, options
from dydit_cli.cli.help_text import examples
from dydit_cli.errors import DyditError
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from dydit_cli.recipe.loading import Recipe

EXAMPLES = (
    "dydit recipes list",
    "dydit recipes show dit-xl-2-256/full",
    "dydit recipes copy dit-xl-2-256/full my.yaml",
    "dydit recipes validate my.yaml",
)

app = typer.Typer(help="List, show, copy and validate recipes.", rich_markup_mode="rich")


BuiltinName = Annotated[
    str,
    typer.Argument(
        help="A name that `dydit recipes list` shows.", autocompletion=completing.recipe_names, metavar="NAME"
    ),
]


RecipeName = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or a name that `dydit recipes list` shows.",
        autocompletion=completing.recipe_names,
        metavar="NAME",
    ),
]


@app.command("list", epilog=examples(("dydit recipes list", "dydit recipes list --json")))
def list_recipes(
    json: options.AsJson = False,
) -> None:
    """List the built-in recipes."""
    from dydit_cli.recipe.builtin import builtin_recipes
    from dydit_cli.recipe.loading import load_recipe

    loaded = {recipe.name: load_recipe(recipe.name) for recipe in builtin_recipes()}
    if json:
        console.emit_json([_as_entry(name, recipe) for name, recipe in loaded.items()])
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "description", "stages"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for name, recipe in loaded.items():
        table.add_row(name, recipe.description, " ".join(recipe.sections))
    console.results().print(table)
    console.note("next: dydit recipes copy NAME, or run one in place: dydit convert NAME")


@app.command(
    epilog=examples(("dydit recipes show dit-xl-2-256/full", "dydit recipes show my.yaml --resolved"))
)
def show(
    name: RecipeName,
    resolved: Annotated[bool, typer.Option("--resolved", help="Fill in every default.")] = False,
    json: options.AsJson = False,
) -> None:
    """Print a recipe, as it is written or with every default filled in."""
    from dydit_cli.recipe.builtin import find_recipe
    from dydit_cli.recipe.loading import load_recipe

    text = load_recipe(name).to_yaml() if resolved else find_recipe(name).read_text(encoding="utf-8")
    if json:
        import yaml

        console.emit_json(yaml.safe_load(text))
    else:
        console.say(text.rstrip("\n"))


@app.command(
    epilog=examples(
        ("dydit recipes copy dit-xl-2-256/full", "dydit recipes copy demo/fashion-mnist-dit my.yaml")
    )
)
def copy(
    name: BuiltinName,
    destination: Annotated[
        Path | None,
        typer.Argument(
            help="A file or folder; the recipe's name in this folder if left out.", metavar="DEST"
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Copy a built-in recipe, to change it."""
    from dydit_cli.recipe.builtin import SUFFIX, builtin_recipe

    recipe = builtin_recipe(name)
    file_name = recipe.name.replace("/", "-") + SUFFIX
    target = destination or Path(file_name)
    if target.is_dir():
        target = target / file_name
    _write_new(target, recipe.path.read_bytes())
    if json:
        console.emit_json({"name": recipe.name, "copied_to": target})
    else:
        console.say(f"copied to {target}")
    console.note(f"next: edit it, then dydit recipes validate {quoted(target)}")


@app.command(epilog=examples(("dydit recipes validate my.yaml",)))
def validate(
    files: Annotated[
        list[str], typer.Argument(help="Recipes: YAML files or built-in names.", metavar="FILE...")
    ],
    json: options.AsJson = False,
) -> None:
    """Check recipes completely, without running anything.

    Every section must be complete, so that each stage could run as it is written. Paths are not looked up.
    """
    from dydit_cli.recipe.loading import load_recipe

    refused: list[DyditError] = []
    found: list[dict[str, object]] = []
    for file in files:
        try:
            recipe = load_recipe(file)
        except DyditError as error:
            refused.append(error)
            found.append({"file": file, "ok": False, "mistakes": error.what.splitlines()})
        else:
            found.append({"file": file, "ok": True, "stages": list(recipe.sections)})
            if not json:
                console.say(f"{file}: ok ({', '.join(recipe.sections) or 'no stages'})")
    if json:
        console.emit_json(found)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise DyditError(
            "\n".join(error.what for error in refused),
            why=refused[0].why,
            fix="Correct the recipes named above.",
        )


def _write_new(target: Path, content: bytes) -> None:
    """Write a file that must not exist yet; a write that fails leaves nothing behind."""
    try:
        file = target.open("xb")
    except FileExistsError:
        raise DyditError(
            f"{target} exists already.",
            why="A recipe that you may have changed is never overwritten.",
            fix="Give another DEST, or remove the file first.",
        ) from None
    try:
        with file:
            file.write(content)
    except OSError:
        target.unlink()
        raise


def _as_entry(name: str, recipe: Recipe) -> dict[str, object]:
    return {
        "name": name,
        "description": recipe.description,
        "stages": list(recipe.sections),
        "path": recipe.source,
    }
