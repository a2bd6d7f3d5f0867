"""The formats that `dydit export` writes, in one tuple. To add one, write a file beside this and name it here."""

from __future__ import annotations

from dydit_cli.errors import DyditError
from dydit_cli.export.baked import BAKED_FORMAT
from dydit_cli.export.comfyui.format import COMFYUI
from dydit_cli.export.flat_formats import ORIGINAL, STATIC
from dydit_cli.export.format import OPTIONS, Format
from dydit_cli.export.pipeline_format import DIFFUSERS
from dydit_cli.export.programs.onnx_export import ONNX
from dydit_cli.export.programs.torch_export import TORCH_EXPORT
from dydit_cli.export.pruned import PRUNED_FORMAT
from dydit_cli.export.report import Source
from dydit_cli.recipe.schema import ExportSection

FORMATS: tuple[Format, ...] = (
    DIFFUSERS,
    ORIGINAL,
    STATIC,
    BAKED_FORMAT,
    PRUNED_FORMAT,
    TORCH_EXPORT,
    ONNX,
    COMFYUI,
)


def format_for(source: Source, settings: ExportSection) -> Format:
    """Return the format that the settings name.

    Raises:
        DyditError: If this version has none of that name, or it does not take the family or an option that was given.
    """
    found = next((each for each in FORMATS if each.name == settings.format), None)
    if found is None:
        raise DyditError(
            f"This version of dydit does not write the format '{settings.format}'.",
            why=f"It writes {', '.join(each.name for each in FORMATS)}.",
            fix="Pass one of these with --format.",
        )
    if source.family.name not in found.families:
        raise DyditError(
            f"The {found.name} format does not take a {source.family.title}.",
            why=f"It is written for the families {', '.join(found.families)}.",
            fix=source.family.missing.get("dydit export", found.instead),
        )
    for option in OPTIONS:
        if getattr(settings, option) is not None and option not in found.options:
            takers = [each.name for each in FORMATS if option in each.options]
            raise DyditError(
                f"The {found.name} format takes no --{option}.",
                why=f"It belongs to the formats {', '.join(takers)}." if takers else "No format takes it.",
                fix=f"Leave --{option} out.",
            )
    return found
