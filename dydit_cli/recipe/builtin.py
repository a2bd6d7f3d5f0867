"""The recipes that come with the package, and how a recipe argument finds its file.

In a source checkout they are the folder `recipes/` at its top, where a reader looks for them; a wheel carries the same
folder inside the package as `recipes_builtin`. This module is light, so that `dydit recipes list` and shell completion
answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dydit_cli.errors import DyditError, did_you_mean

SUFFIX = ".yaml"


@dataclass(frozen=True)
class BuiltinRecipe:
    """A packaged recipe: its name (`dit-xl-2-256/full`) and its file."""

    name: str
    path: Path


def builtin_recipes(root: Path | None = None) -> tuple[BuiltinRecipe, ...]:
    """Return the packaged recipes in the order of their names.

    Args:
        root: Where to look; the installed package's own folder if not given.

    Raises:
        DyditError: The installation carries none.
    """
    root = root or _root()
    found = (
        BuiltinRecipe(path.relative_to(root).with_suffix("").as_posix(), path)
        for path in root.rglob(f"*{SUFFIX}")
    )
    return tuple(sorted(found, key=lambda recipe: recipe.name))


def builtin_recipe(name: str) -> BuiltinRecipe:
    """Return the packaged recipe called `name`.

    Raises:
        DyditError: There is none; the nearest name is suggested.
    """
    if recipe := _named(name):
        return recipe
    known = [recipe.name for recipe in builtin_recipes()]
    raise DyditError(
        f"There is no built-in recipe {name!r}.",
        why=f"The built-in recipes are {', '.join(known)}.",
        fix=did_you_mean(name, known) or "`dydit recipes list` describes them.",
    )


def find_recipe(argument: str) -> Path:
    """Return the file that a recipe argument means: a path if such a file exists, else a built-in name.

    Raises:
        DyditError: It is neither; near files and names are suggested.
    """
    path = Path(argument).expanduser()
    if path.exists():
        return path
    if recipe := _named(argument):
        return recipe.path
    known = [recipe.name for recipe in builtin_recipes()] + _neighbours(path)
    raise DyditError(
        f"There is no recipe {argument!r}.",
        why="It is neither a file that exists nor the name of a built-in recipe.",
        fix=did_you_mean(argument, known) or "Give a YAML file, or a name that `dydit recipes list` shows.",
    )


def _named(name: str) -> BuiltinRecipe | None:
    return next((recipe for recipe in builtin_recipes() if recipe.name == name.removesuffix(SUFFIX)), None)


def _neighbours(path: Path) -> list[str]:
    """Return the recipe files that stand where `path` was looked for."""
    try:
        return [
            str(path.parent / file.name)
            for file in sorted(path.parent.iterdir())
            if file.suffix in {".yaml", ".yml"}
        ]
    except OSError:
        return []


def _root() -> Path:
    package = Path(str(files("dydit_cli")))
    for folder in (package / "recipes_builtin", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise DyditError(
        "The built-in recipes are missing.",
        why=f"Neither {package / 'recipes_builtin'} nor {package.parent / 'recipes'} exists.",
        fix="Install dydit again, or give the path of a recipe of your own.",
    )
