"""Put a recipe file, `key=value` overrides and plain options together into validated sections.

What is nearer to the user wins: an option and an override beat the file, the file beats the schema's default. A stage's
`model` that nobody gave is the `out` of the stage before it. All mistakes are reported together, each with the line or the
argument where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dydit_cli.recipe.builtin import SUFFIX, builtin_recipes, find_recipe
from dydit_cli.recipe.document import Document, read_document, scalar
from dydit_cli.recipe.mistakes import COMMAND_LINE, Mistake, Place, explain, refuse, unknown
from dydit_cli.recipe.schema import MOMENTARY_KEYS, SCHEMA_VERSION, SECTIONS, Section

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        name: The recipe's name, or the file's if it names itself nowhere.
        description: One line, may be empty.
        source: The file, or None if everything came from the command line.
        sections: The complete sections by stage.
        incomplete: Sections of other stages that still lack a required key, as written.
    """

    name: str
    description: str
    source: Path | None
    sections: Mapping[str, Section]
    incomplete: Mapping[str, Mapping[str, Any]]

    def get(self, section: type[AnySection]) -> AnySection | None:
        """Return another stage's section, or None if it is absent or incomplete."""
        found = self.sections.get(section.stage)
        return found if isinstance(found, section) else None

    def to_yaml(self) -> str:
        """Write the recipe with every default filled in; `load_recipe` reads it back to the same sections.

        `resume` and `overwrite` are left out: `dydit finetune OUT/recipe.yaml --resume` must work after a start with
        `--overwrite`, and a recipe that was handed on must not replace anything by itself.
        """
        body: dict[str, Any] = {"schema": SCHEMA_VERSION, "name": self.name, "description": self.description}
        for stage in SECTIONS:
            if stage in self.sections:
                body[stage] = self.sections[stage].model_dump(mode="json", exclude=set(MOMENTARY_KEYS))
            elif stage in self.incomplete:
                kept = {
                    key: value for key, value in self.incomplete[stage].items() if key not in MOMENTARY_KEYS
                }
                body[stage] = kept
        return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120)


def load_recipe(
    source: str | Path | None,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Recipe:
    """Load and check a recipe.

    Args:
        source: A YAML file, the name of a built-in recipe, or None for a recipe made of overrides and options alone.
        overrides: `key=value` for a key of `stage`, or `section.key=value` for any.
        stage: The stage that is about to run. Its section is made even if the file has none, and must be complete; other
            sections are checked too, but may lack required keys. With None every section of the file must be complete.
        options: Values by key of `stage`'s section, already typed, as options of the command line give them.

    Raises:
        DyditError: The file cannot be read, or anything in it or on the command line is wrong: all of it at once.
    """
    path = None if source is None else find_recipe(str(source))
    document = Document(COMMAND_LINE) if path is None else read_document(path, str(source))
    if stage is not None:
        document.sections.setdefault(stage, {})
    _apply_overrides(document, overrides, stage)
    if stage is not None:
        _apply_options(document, options or {}, stage)
    _chain_models(document.sections)
    sections, incomplete = _validate(document, stage)
    if document.mistakes:
        raise refuse(document.mistakes)
    name = document.header.get("name") or (_name_of(path) if path else stage or "")
    return Recipe(name, document.header.get("description", ""), path, sections, incomplete)


def _name_of(path: Path) -> str:
    packaged = (recipe.name for recipe in builtin_recipes() if recipe.path == path)
    return next(packaged, path.name.removesuffix(SUFFIX))


def _apply_overrides(document: Document, overrides: Sequence[str], stage: str | None) -> None:
    for override in overrides:
        name, _, text = override.partition("=")
        name = name.strip().replace("-", "_")
        section, _, key = name.rpartition(".")
        section = section or stage or ""
        problem = _misplaced(section, key, stage, text)
        if problem is None:
            try:
                document.sections.setdefault(section, {})[key] = scalar(text)
                document.places[f"{section}.{key}"] = Place(COMMAND_LINE)
            except ValueError as error:
                problem = str(error)
        if problem is not None:
            document.mistakes.append(Mistake(Place(COMMAND_LINE), override, problem))


def _misplaced(section: str, key: str, stage: str | None, text: str) -> str | None:
    """Say what is wrong with the name or the emptiness of an override, if anything."""
    if section not in SECTIONS:
        return (
            unknown(section, SECTIONS, kind="section")
            if section
            else "needs its section, as in `finetune.steps=10`"
        )
    fields = SECTIONS[section].model_fields
    if key not in fields:
        hint = unknown(key, fields)
        return hint if section == stage else f"{hint} (in section {section})"
    return "has no value; write `null` for none" if not text.strip() else None


def _apply_options(document: Document, options: Mapping[str, object], stage: str) -> None:
    for key, value in options.items():
        place = Place(f"--{key.replace('_', '-')}")
        if document.places.get(f"{stage}.{key}") == Place(COMMAND_LINE):
            message = f"given twice, as {place} and as {key}=…; give it once"
            document.mistakes.append(Mistake(Place(COMMAND_LINE), f"{stage}.{key}", message))
        document.sections[stage][key] = str(value) if isinstance(value, Path) else value
        document.places[f"{stage}.{key}"] = Place(COMMAND_LINE)


def _chain_models(sections: dict[str, dict[str, Any]]) -> None:
    """Give a stage without a `model` the `out` of the nearest stage before it."""
    for stage, values in sections.items():
        if values.get("model") is not None or values.get("preset") is not None:
            continue
        outs = (sections.get(parent, {}).get("out") for parent in SECTIONS[stage].parents)
        if out := next((out for out in outs if out is not None), None):
            values["model"] = out


def _validate(document: Document, stage: str | None) -> tuple[dict[str, Section], dict[str, dict[str, Any]]]:
    """Validate every section, adding to the document's mistakes."""
    sections: dict[str, Section] = {}
    incomplete: dict[str, dict[str, Any]] = {}
    for name, values in document.sections.items():
        try:
            sections[name] = SECTIONS[name].model_validate(values)
        except ValidationError as error:
            for entry in error.errors():
                if entry["type"] != "missing":
                    document.mistakes.append(_mistake(document, name, entry["loc"], explain(entry)))
                elif stage not in (None, name):
                    incomplete[name] = values
                elif f"{name}.{entry['loc'][0]}" not in document.places:  # else its form was refused already
                    document.mistakes.append(_mistake(document, name, entry["loc"], _missing(entry, stage)))
    return sections, incomplete


def _missing(entry: Mapping[str, Any], stage: str | None) -> str:
    name = str(entry["loc"][0])
    given = f"; give --{name.replace('_', '-')} VALUE or {name}=VALUE"
    return "required key is missing" + (given if stage else "")


def _mistake(document: Document, section: str, location: Sequence[str | int], message: str) -> Mistake:
    """Place one validation error: at the key's line, else at the section's, else at the file as a whole."""
    key = ".".join([section, *(str(part) for part in location[:1])])
    place = document.places.get(key) or document.places.get(section) or Place(document.source)
    return Mistake(place, key, message)
