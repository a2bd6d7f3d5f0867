"""What an export starts from, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dydit_cli.artifacts.ancestry import manifest_of
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.artifacts.manifest import weights_hash
from dydit_cli.checkpoints.terms import Terms
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.export.card import Subject
from dydit_cli.export.lineage import Lineage
from dydit_cli.export.measured import measured_section
from dydit_cli.export.metadata import chosen_terms
from dydit_cli.families.family import Family
from dydit_cli.recipe.schema import ExportSection

Progress = Callable[[str], None]
"""Called with what is being done."""

READ_BACK = "Read back, every tensor is bit for bit what was meant."


def loaded_and_compared(difference: float) -> str:
    """What is said of an export that was run with its own code."""
    return f"Loaded with its own code, it differs from the model by at most {difference:.1e}."


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        out: The folder.
        format: Its name.
        family: Name of the family.
        dtype: Of the written weights (of most of them, where the source mixes types).
        max_difference: Between the outputs of the source and of what was written, loaded with its own code; 0 where the stored
            tensors themselves were written and compared.
        files: Bytes by file.
        sha256: Hashes of the weight files.
        needs_vae: Whether an autoencoder must be passed when the pipeline is loaded.
        notes: What its user should know.
        verified: What was verified, in one sentence.
        ratio: Realised share of attention and MLP MACs of the model; None if it was not fine-tuned.
        license: What its card says; ``unknown`` if nothing does.
        url: Where it was published, if it was.
        facts: What else the command shows, by a word or two: the size against another format's, say.
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
    verified: str = ""
    ratio: float | None = None
    license: str | None = None
    url: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


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
    verified: str = READ_BACK,
    facts: Mapping[str, str] | None = None,
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
        verified=verified,
        facts=dict(facts or {}),
    )


def subject_of(source: Source, settings: ExportSection, geometry: Geometry, dtype: str) -> Subject:
    """What the card is about."""
    return Subject(
        Path(settings.out).resolve().name,
        source.family,
        geometry,
        source.lineage,
        dtype,
        terms=terms_for(source, settings),
        measured=measured_for(source, settings),
    )


def terms_for(source: Source, settings: ExportSection) -> Terms:
    """The licence of an export, and where its base was published.

    Raises:
        DyditError: If the settings name a licence that is nearly one.
    """
    return chosen_terms(Terms(**source.lineage.terms), settings.license)


def measured_for(source: Source, settings: ExportSection) -> str:
    """The card's section of what was measured.

    Raises:
        DyditError: If nothing was measured where the settings say so, or of another model.
    """
    if not settings.measured:
        return ""
    # The manifest of a pipeline folder has no hash: its weights lie in transformer/.
    recorded = (manifest_of(source.path) or {}).get("weights_sha256")
    return measured_section(settings.measured, recorded or weights_hash(model_folder(source.path)))
