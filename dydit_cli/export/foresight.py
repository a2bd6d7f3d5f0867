"""What an export would read and write, without writing: `dydit export --dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts.loading import model_folder
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import TensorSpec, lazily
from dydit_cli.export.export import opened
from dydit_cli.export.flat import is_order, is_router
from dydit_cli.export.flux import STREAMED
from dydit_cli.export.metadata import license_fields
from dydit_cli.export.pipeline_format import PIPELINE_DTYPE
from dydit_cli.export.report import Source, terms_for
from dydit_cli.export.vae import find_vae
from dydit_cli.families.original_flux import is_ours
from dydit_cli.pipelines.folder import open_pipeline
from dydit_cli.recipe.schema import ExportSection

KNOWN = ("diffusers", "original", "static")
"""Formats that write the tensors that there are; of others the size follows from the schedule or the timestep."""


@dataclass(frozen=True)
class ExportForesight:
    """What would be written.

    Attributes:
        model: What is read.
        out: The folder.
        format: Its name.
        family: Name of the family.
        base: What the model was made of, if that is recorded.
        ratio: Its realised share of attention and MLP MACs; None of a model that was not fine-tuned.
        read_bytes: Of its weights.
        weight_bytes: Of the weights that are written.
        exact: Whether that is their size, or the most that it can be.
        part_bytes: Of the autoencoder and the pipeline's parts that are copied.
        license: What the card would say.
    """

    model: str
    out: str
    format: str
    family: str
    base: str | None
    ratio: float | None
    read_bytes: int
    weight_bytes: int
    exact: bool
    part_bytes: int
    license: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def foresee(settings: ExportSection) -> ExportForesight:
    """Look at what an export would read.

    Raises:
        DyditError: For a model, a format, options or a folder that the export would refuse before it reads weights.
    """
    source, chosen = opened(settings)
    terms = license_fields(terms_for(source, settings))
    specs = lazily(open_checkpoint(model_folder(source.path)).tensors).specs
    return ExportForesight(
        model=str(source.path),
        out=str(settings.out),
        format=chosen.name,
        family=source.family.name,
        base=source.lineage.base,
        ratio=source.lineage.ratio,
        read_bytes=sum(spec.nbytes for spec in specs.values()),
        weight_bytes=_written(source, settings, specs),
        exact=chosen.name in KNOWN,
        part_bytes=_parts(source, settings),
        license=terms.get("license_name", terms["license"]),
    )


def _written(source: Source, settings: ExportSection, specs: dict[str, TensorSpec]) -> int:
    streamed, static = source.family.objective == STREAMED, settings.format == "static"
    usual = settings.dtype or (PIPELINE_DTYPE if settings.format == "diffusers" and not streamed else None)
    dtypes = {"*": usual} if usual else source.lineage.dtypes if static else {}
    total = 0
    for key, spec in specs.items():
        if static and (is_ours(key) if streamed else is_router(key) or is_order(key)):
            continue
        name = dtypes.get(key, dtypes.get("*"))
        # Integers stay what they are.
        dtype = getattr(torch, name) if name and spec.dtype.is_floating_point else spec.dtype
        total += spec.numel * dtype.itemsize
    return total


def _parts(source: Source, settings: ExportSection) -> int:
    total = 0
    if settings.vae is not None and "in_channels" in source.config:
        found = (
            find_vae(settings.vae, int(source.config["in_channels"]))
            if source.family.objective != STREAMED
            else None
        )
        total += found.nbytes if found is not None else _size(Path(settings.vae).expanduser())
    if settings.pipeline is not None:
        folder = open_pipeline(settings.pipeline).path
        for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            total += _size(folder / part)
        if settings.vae is None:
            total += _size(folder / "vae")
    return total


def _size(folder: Path) -> int:
    """Bytes of what would be copied of a part: configurations and safetensors."""
    if not folder.is_dir():
        return 0
    return sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".json", ".txt", ".model")
    )
