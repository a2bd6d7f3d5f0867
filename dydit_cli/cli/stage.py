"""What the stage commands share: from `RECIPE key=value … --options` to a validated section.

A stage command declares an option for the keys that are worth one, each with the default None for "not given", and calls
`resolve`, which reads all of them from typer's context. So a default stands in one place only, the schema, and a key without
an option of its own is still reachable as `key=value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import typer

from dydit_cli.errors import DyditError

if TYPE_CHECKING:
    from dydit_cli.recipe.loading import Recipe
    from dydit_cli.recipe.schema import Section

AnySection = TypeVar("AnySection", bound="Section")

STAGES = ("prepare", "convert", "finetune", "profile", "sample", "evaluate", "export")


@dataclass(frozen=True)
class Request(Generic[AnySection]):
    """What the user asked a stage to do: its section, and the recipe that it came from."""

    section: AnySection
    recipe: Recipe


def resolve(context: typer.Context, section: type[AnySection]) -> Request[AnySection]:
    """Turn a stage command's arguments and options into its validated section.

    Args:
        context: The command's context. Parameters named like a key of the section count if they were given; others are the
            command's own (`--json`).
        section: The stage's section class.

    Raises:
        DyditError: Anything in the recipe, the overrides or the options is wrong; all mistakes at once.
    """
    from dydit_cli.recipe.loading import load_recipe

    recipe, overrides = split_arguments(context.params.get("arguments") or ())
    options = {
        name: value
        for name, value in context.params.items()
        if name in section.model_fields and value is not None
    }
    loaded = load_recipe(recipe, overrides, section.stage, options)
    made = loaded.sections[section.stage]
    if not isinstance(made, section):
        raise TypeError(f"stage {section.stage} made a {type(made).__name__}")
    return Request(made, loaded)


def split_arguments(arguments: list[str] | tuple[str, ...]) -> tuple[str | None, list[str]]:
    """Tell the recipe from the overrides: an override holds `=` with no path before it.

    Raises:
        DyditError: More than one argument could be the recipe.
    """
    overrides = [argument for argument in arguments if is_override(argument)]
    others = [argument for argument in arguments if not is_override(argument)]
    if len(others) > 1:
        raise DyditError(
            f"More than one recipe is named: {' and '.join(others)}.",
            why="A stage takes one recipe; everything else is written as key=value or --key value.",
            fix=f"Write what {others[1]!r} is meant for, as in `steps={others[1]}`, or leave it out.",
        )
    return (others[0] if others else None), overrides


def is_override(argument: str) -> bool:
    """Whether a word is ``key=value`` and no path."""
    key, sign, _ = argument.partition("=")
    return bool(sign) and not any(separator in key for separator in "/\\")
