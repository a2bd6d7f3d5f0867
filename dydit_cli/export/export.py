"""Export a dynamic model: read its past, write it in one of the formats, verify what was written."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from dydit_cli.artifacts import artifact_folder, model_config, write_manifest
from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.errors import DyditError
from dydit_cli.export.format import Format
from dydit_cli.export.formats import format_for
from dydit_cli.export.lineage import lineage_of
from dydit_cli.export.metadata import license_fields
from dydit_cli.export.report import ExportReport, Progress, Source, measured_for, terms_for
from dydit_cli.families.family import Family
from dydit_cli.families.registry import class_named, family_named
from dydit_cli.recipe.schema import ExportSection

WEIGHT_FILES = (".safetensors", ".pt", ".pt2", ".onnx", ".data")
"""Endings of the files whose hashes are told."""


def export(
    settings: ExportSection, *, recipe_yaml: str | None = None, on_progress: Progress | None = None
) -> ExportReport:
    """Write a model for use elsewhere.

    Args:
        settings: The recipe's section.
        recipe_yaml: The resolved recipe, to be kept in the export.
        on_progress: Called as work goes on.

    Raises:
        DyditError: For everything that a user can put right; nothing is left behind then.
    """
    say, out = on_progress or _silent, Path(settings.out)
    source, chosen = opened(settings)
    with artifact_folder(out, overwrite=settings.overwrite) as folder:
        report = chosen.write(source, settings, folder, say)
        weights = [file for file in sorted(folder.rglob("*")) if file.suffix in WEIGHT_FILES]
        hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in weights}
        if recipe_yaml is not None:
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        terms = license_fields(terms_for(source, settings))
        report = replace(
            report,
            sha256=hashes,
            files=_files(folder),
            ratio=source.lineage.ratio,
            license=terms.get("license_name", terms["license"]),
        )
        write_manifest(
            folder,
            stage="export",
            settings=settings.model_dump(mode="json"),
            parent=settings.model,
            results={**asdict(report), "lineage": asdict(source.lineage)},
        )
    return report


def opened(settings: ExportSection) -> tuple[Source, Format]:
    """The model that is to be exported, its weights unread, and the format.

    Raises:
        DyditError: If there is no such model, the format does not take it or what else the settings say, or something stands where
            it would be written.
    """
    model, out = Path(settings.model).expanduser(), Path(settings.out)
    _refuse_own_source(out, model)
    refuse_existing(out, settings.overwrite)
    config = model_config(model)
    source = Source(model, config, _family(str(config["_class_name"])), lineage_of(model))
    chosen = format_for(source, settings)
    chosen.check(source, settings)
    # What the card will say is looked at before hours are spent on weights.
    terms_for(source, settings)
    measured_for(source, settings)
    return source, chosen


def _family(class_name: str) -> Family:
    found = class_named(class_name)
    if found is None:  # `model_config` has refused it already
        raise TypeError(class_name)
    return family_named(found.family)


def _files(folder: Path) -> dict[str, int]:
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _refuse_own_source(out: Path, model: Path) -> None:
    """Replacing an export must not replace what is exported.

    Raises:
        DyditError: If ``out`` is the model's folder, or holds it.
    """
    there = [place for place in (model, *model.resolve().parents) if out.exists() and place.exists()]
    # By what they are and not by name: not every file system tells `Runs` from `runs`.
    if any(place.samefile(out) for place in there):
        raise DyditError(
            f"{out} is, or holds, the model that is to be exported.",
            why="The export would replace what it reads.",
            fix="Choose another --out.",
        )


def _silent(what: str) -> None:
    """Progress that nobody watches."""
