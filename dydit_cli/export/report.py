"""What an export starts from, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.export.card import Subject
from dydit_cli.export.lineage import Lineage
from dydit_cli.families.family import Family
from dydit_cli.recipe.schema import ExportSection

Progress = Callable[[str], None]
"""Called with what is being done."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        out: The folder.
        format: ``diffusers``, ``original`` or ``static``.
        family: Name of the family.
        dtype: Of the written weights (of most of them, where the source mixes types).
        max_difference: Between the outputs of the source and of what was written, loaded with its own code; 0 where the stored
            tensors themselves were written and compared.
        files: Bytes by file.
        sha256: Hashes of the weight files.
        needs_vae: Whether an autoencoder must be passed when the pipeline is loaded.
        notes: What its user should know.
    """

    out: str
    format: str
    family: str
    dtype: str
    max_difference: float
    files: dict[str, int]
    sha256: dict[str, str]
    needs_vae: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The model to export.

    Attributes:
        path: Its artifact.
        config: Its configuration.
        family: Its family.
        lineage: Its past.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    lineage: Lineage


def report_of(
    source: Source,
    settings: ExportSection,
    dtype: str,
    difference: float,
    *,
    needs_vae: bool,
    notes: list[str],
) -> ExportReport:
    """The report of an export whose files are not listed yet."""
    return ExportReport(
        out=str(settings.out),
        format=settings.format,
        family=source.family.name,
        dtype=dtype,
        max_difference=difference,
        files={},
        sha256={},
        needs_vae=needs_vae,
        notes=tuple(notes),
    )


def subject_of(source: Source, settings: ExportSection, geometry: Geometry, dtype: str) -> Subject:
    """What the card is about."""
    return Subject(Path(settings.out).resolve().name, source.family, geometry, source.lineage, dtype)
