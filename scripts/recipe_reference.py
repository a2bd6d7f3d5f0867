"""The reference of all recipe keys, made of the schema and the command line: docs/recipe_reference.md.

    python scripts/recipe_reference.py            # print it
    python scripts/recipe_reference.py --write    # write it anew after a change of the schema or of an option

Keys, types, ranges and defaults are read from the fields of `dydit_cli/recipe/schema.py`, meanings from its docstrings, options from the
commands. A test compares the page with what this makes, so that the page cannot fall behind.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from dydit_cli.families.family import Family
    from dydit_cli.recipe.schema import Section

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FILE = "docs/recipe_reference.md"

READS = {
    "whole": "whole number",
    "real": "number",
    "flag": "true or false",
    "text": "text",
    "location": "path or name",
    "names": "names (`a,b`)",
    "labels": "whole numbers (`0,1`)",
    "shares": "numbers (`0.3,1.0`)",
    "flag_or_labels": "true, false, or labels (`5,7`)",
}
"""What each function of `dydit_cli/recipe/values.py` takes."""

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

HUGE = 2**31
"""Bounds above it say how numbers are stored, which is of no use to a reader."""

INTRODUCTION = """\
# Recipe reference

Made by `python scripts/recipe_reference.py --write` from `dydit_cli/recipe/schema.py` and the commands; not edited by hand.
[recipes.md](recipes.md) tells how recipes are written, changed and checked.

Every key can be set in a recipe, as `key=value` behind the command, and, where a column says so, by an option. A key without a default
(–) is off, or chosen as its meaning says; "families" is empty where all of them take the key; "(ours)" marks what neither paper gives.
Sides are in pixels, lengths of training and sampling in steps, ratios are shares of the static model's multiply-accumulates (MACs) of
attention and MLP. What goes together and what does not is checked when a command begins, and by `dydit recipes validate`.
"""


@dataclass(frozen=True)
class Key:
    """A row of the reference.

    Attributes:
        name: The key.
        takes: Its type, range or choices, in words.
        default: As a recipe would write it; "needed" or "–" without one.
        option: The command's option; empty without one.
        families: Those that take it; empty for all.
        meaning: From the docstring.
    """

    name: str
    takes: str
    default: str
    option: str
    families: str
    meaning: str


def reference() -> str:
    """The whole page."""
    from dydit_cli.families.registry import FAMILIES
    from dydit_cli.recipe.schema import MOMENTARY_KEYS, SCHEMA_VERSION, SECTIONS

    parts = [INTRODUCTION]
    momentary = " and ".join(f"`{name}`" for name in sorted(MOMENTARY_KEYS, reverse=True))
    parts.append(
        f"At the top of a file stand `schema: {SCHEMA_VERSION}`, `name`, `description`, and the sections below.\n"
        f"{momentary} say how a command is started and not what it makes; the recipe that an artifact keeps is without them.\n"
    )
    for stage, section in SECTIONS.items():
        parts.append(f"## {stage}\n\n{_summary(section)}\n")
        if section.parents:
            chain = ", else of ".join(f"`{name}`" for name in section.parents)
            parts.append(f"`model` is the `out` of {chain} in the same recipe where it is not given.\n")
        parts += [
            f"{_without(family, stage)} {family.missing[f'dydit {stage}']}\n"
            for family in FAMILIES
            if f"dydit {stage}" in family.missing
        ]
        parts.append(_table(list(keys(section))))
    return "\n".join(parts)


def keys(section: type[Section]) -> Iterator[Key]:
    """The keys of a section in the schema's order.

    Raises:
        ValueError: If a key has no meaning in the section's docstring, or of a type that `READS` does not know.
    """
    said, options = meanings(section), _options(section.stage)
    hints = get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        if name not in said:
            raise ValueError(f"{section.__name__} does not say what {name} means")
        families, meaning = split_families(said[name])
        default = "needed" if field.is_required() else _written(field.default)
        yield Key(name, takes(hints[name]), default, options.get(name, ""), families, meaning)


def meanings(section: type[Section]) -> dict[str, str]:
    """What the docstring's Attributes say, by key; a line of its own for several keys is each one's."""
    _, _, listed = cleandoc(section.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    current: tuple[str, ...] = ()
    for line in listed.splitlines():
        begins = re.match(r"^ {4}(\w+(?:, \w+)*): (.*)$", line)
        if begins:
            current = tuple(begins[1].split(", "))
            found |= dict.fromkeys(current, begins[2])
        elif line.strip():
            for name in current:
                found[name] += f" {line.strip()}"
    return found


def split_families(meaning: str) -> tuple[str, str]:
    """(families, rest) of a meaning such as ``FLUX: a prompt`` or ``DiT, SiT: a share``."""
    from dydit_cli.families.registry import FAMILIES

    begins, colon, rest = meaning.partition(": ")
    titles = {family.title for family in FAMILIES}
    if colon and set(begins.split(", ")) <= titles:
        return begins, rest[:1].upper() + rest[1:]
    return "", meaning


def takes(annotation: Any) -> str:
    """A type, its range or its choices in words."""
    if get_origin(annotation) in (Union, UnionType):
        (held,) = (each for each in get_args(annotation) if each is not type(None))
        return takes(held)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is not Annotated:
        raise ValueError(f"{annotation} is no type of dydit_cli/recipe/values.py")
    held, *rules = get_args(annotation)
    (reader,) = (rule.func.__name__ for rule in rules if hasattr(rule, "func"))
    choices = next((each for each in get_args(held) if get_origin(each) is Literal), None)
    if choices is not None:
        return f"some of {takes(choices)}"
    bounds = [
        f"{SIGNS[kind]} {limit:g}"
        for rule in rules
        for bound in getattr(rule, "metadata", ())
        for kind in SIGNS
        if (limit := getattr(bound, kind, None)) is not None and abs(limit) < HUGE
    ]
    return ", ".join([READS[reader], *bounds])


def _written(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _options(stage: str) -> dict[str, str]:
    """Long options of a stage's command by the key that they set."""
    import typer

    from dydit_cli.cli.app import app

    group: Any = typer.main.get_command(app)
    command = group.commands[stage]
    return {
        parameter.name: f"`{parameter.opts[0]}`"
        for parameter in command.params
        if parameter.param_type_name == "option"
    }


def _without(family: Family, stage: str) -> str:
    """That a stage does not take a family; of `export`, which formats take it all the same."""
    from dydit_cli.export.formats import FORMATS

    taken = [f"`{each.name}`" for each in FORMATS if stage == "export" and family.name in each.families]
    return f"Not for {family.title}" + (f", but for the format {', '.join(taken)}." if taken else ".")


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _table(rows: list[Key]) -> str:
    columns: Mapping[str, str] = {
        "key": "name",
        "takes": "takes",
        "default": "default",
        "option": "option",
        "families": "families",
        "meaning": "meaning",
    }
    # Only shown where some key is not for all of them.
    shown = [
        title for title, field in columns.items() if title != "families" or any(row.families for row in rows)
    ]
    lines = [f"| {' | '.join(shown)} |", "| " + " | ".join("---" for _ in shown) + " |"]
    for row in rows:
        cells = [
            f"`{row.name}`" if title == "key" else getattr(row, columns[title]).replace("|", "\\|")
            for title in shown
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, or write it."""
    text = reference()
    if "--write" in sys.argv[1:]:
        (ROOT / FILE).write_text(text, encoding="utf-8")
        return
    print(text, end="")


if __name__ == "__main__":
    main()
