"""Exports of FLUX, whose weights pass one by one: a pipeline folder, a file with routers, the static model."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from dydit_cli.artifacts import write_json
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.layout import Rearranged, Rows
from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily
from dydit_cli.errors import DyditError
from dydit_cli.export.flat import write_flat
from dydit_cli.export.flux_card import flux_original_card, flux_pipeline_card, flux_static_card
from dydit_cli.export.flux_parts import find_parts
from dydit_cli.export.flux_verify import flux_difference
from dydit_cli.export.inline import FLUX_ROOTS, inline
from dydit_cli.export.refusals import refuse_budget, refuse_parts
from dydit_cli.export.registration import MODULE
from dydit_cli.export.report import (
    ExportReport,
    Progress,
    Source,
    loaded_and_compared,
    report_of,
    subject_of,
)
from dydit_cli.export.skeleton import arguments_of, skeleton
from dydit_cli.export.space import check_space
from dydit_cli.export.tensors import Cast, commonest_dtype, write_compared
from dydit_cli.families.flux import DyFluxTransformer2DModel
from dydit_cli.families.flux_geometry import FluxGeometry
from dydit_cli.families.original_flux import is_ours, layout_for_others, to_original
from dydit_cli.recipe.schema import ExportSection

STREAMED = "rectified-flow"
"""The objective of the families whose exports are made here."""
CODE = f"{MODULE}.py"
FILE = "model.safetensors"
STATIC_CLASS = "FluxTransformer2DModel"
DRIVING: Mapping[str, Collection[str]] = {
    "FluxPipeline": (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
    ),
    "FluxControlPipeline": (
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
    ),
    "FluxFillPipeline": ("FluxFillPipeline",),
}
"""Of diffusers' pipelines, by that of `FluxGeometry.pipeline_class`: those that give a transformer inputs of the same width. The
ones with a ControlNet are not among them: they need a part that no export has."""


def export_flux(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write an export of FLUX into an empty folder.

    Raises:
        DyditError: For everything that a user can put right.
    """
    model, tensors = open_flux(source, say)
    if settings.format == "diffusers":
        return _write_pipeline(source, settings, model, tensors, folder, say)
    write = _write_original if settings.format == "original" else _write_static
    return write(source, settings, model, tensors, folder, say)


def check_flux_pipeline(source: Source, settings: ExportSection) -> None:
    """See that a FLUX goes into a pipeline folder as the settings say.

    Raises:
        DyditError: For parts that do not fit it, and for a budget, which no FLUX serves.
    """
    refuse_budget(source, settings)
    find_parts(settings.pipeline, settings.vae, flux_skeleton(source).geometry)


def check_flux_file(source: Source, settings: ExportSection) -> None:
    """See that a FLUX is written without routers, or in black-forest-labs' layout with them, as the settings say.

    Raises:
        DyditError: For parts of a pipeline, for a budget, and for models that the layout cannot hold.
    """
    refuse_parts(settings)
    refuse_budget(source, settings)
    if settings.format == "static" and source.lineage.layout != "original":
        _static_config(flux_skeleton(source))
    if settings.format == "original" and source.config.get("width", "free") == "ordered":
        raise DyditError(
            "A model of ordered width cannot be written in the original layout.",
            why="The names are the authors', whose routers have a row a unit; here a row is a step between two units.",
            fix="Pass --format diffusers, or --format static for the complete model.",
        )


def flux_skeleton(source: Source) -> DyFluxTransformer2DModel:
    """See `skeleton`."""
    model = skeleton(source)
    if not isinstance(model, DyFluxTransformer2DModel):
        raise TypeError(type(model).__name__)
    return model


def open_flux(source: Source, say: Progress) -> tuple[DyFluxTransformer2DModel, LazyTensors]:
    """A model without weights (on the device ``meta``), and its weights, none of them read yet.

    Raises:
        DyditError: If some are missing.
    """
    say("reading the model")
    model = flux_skeleton(source)
    tensors = lazily(open_checkpoint(model_folder(source.path)).tensors)
    check_whole(model, tensors, source.path)
    return model, tensors


def pipeline_of(geometry: FluxGeometry, given: str | None) -> str:
    """Name of diffusers' pipeline that drives a model.

    Args:
        geometry: Of the model.
        given: That of the folder which the parts come from: Kontext is built like dev, and only it knows.

    Returns:
        The given one if its transformer is built like the model, and diffusers has it; else the plain one of such a model.
    """
    usual = geometry.pipeline_class
    return given if given in DRIVING[usual] and given in dir(diffusers) else usual


def _write_pipeline(
    source: Source,
    settings: ExportSection,
    model: DyFluxTransformer2DModel,
    tensors: LazyTensors,
    folder: Path,
    say: Progress,
) -> ExportReport:
    parts = find_parts(settings.pipeline, settings.vae, model.geometry)
    written = Cast(tensors, {"*": settings.dtype} if settings.dtype else {})
    dtype = commonest_dtype(written)
    check_space(folder, sum(spec.nbytes for spec in written.specs.values()) + parts.nbytes)
    say("writing the pipeline")
    code = inline(FLUX_ROOTS)
    transformer = folder / "transformer"
    transformer.mkdir()
    model.save_config(transformer)
    write_compared(transformer, written, max_shard_size=settings.max_shard_size)
    (transformer / CODE).write_text(code, encoding="utf-8")
    name = pipeline_of(model.geometry, parts.pipeline_class)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": name,
            "_diffusers_version": diffusers.__version__,
            **parts.copy_to(folder, code),
            "transformer": [MODULE, type(model).__name__],
        },
    )
    say("verifying the pipeline against the model")
    difference, whole = flux_difference(
        type(model), arguments_of(source), written, transformer, transformer / CODE
    )
    subject = subject_of(source, settings, model.geometry, dtype)
    (folder / "README.md").write_text(flux_pipeline_card(subject, parts, name), encoding="utf-8")
    notes = []
    if not whole:
        notes.append(
            "All weights were compared with the model's; its outputs with one block of either kind, because the whole model is large."
        )
    if parts.missing:
        advice = "pass them when you load it" + (
            ", or export with --pipeline FOLDER." if settings.pipeline is None else "."
        )
        notes.append(f"The folder has no {', '.join(parts.missing)}: {advice}")
    if parts.pipeline_class is not None and parts.pipeline_class != name:
        notes.append(
            f"The parts come from a {parts.pipeline_class}, which does not drive such a model; the folder is a {name}."
        )
    return report_of(
        source,
        settings,
        dtype,
        difference,
        needs_vae=parts.vae is None,
        notes=notes,
        verified=loaded_and_compared(difference),
    )


def _write_original(
    source: Source,
    settings: ExportSection,
    model: DyFluxTransformer2DModel,
    tensors: LazyTensors,
    folder: Path,
    say: Progress,
) -> ExportReport:
    kept = without_identity_orders(tensors)
    ordered = any(key.endswith("_order") for key in kept)
    renamed = Rearranged(kept, layout_for_others(kept.specs))
    written = Cast(renamed, {"*": settings.dtype} if settings.dtype else {})
    dtype = commonest_dtype(written)
    say(f"writing and comparing {FILE}")
    write_compared(folder, written, stem=Path(FILE).stem, max_shard_size=None)
    authors = source.config.get("token_router") == "authors"
    subject = subject_of(source, settings, model.geometry, dtype)
    card = flux_original_card(
        subject, FILE, axes=model.config.axes_dims_rope, authors=authors, ordered=ordered
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    notes = []
    if ordered:
        notes.append(
            "The units keep the order of the static checkpoint and the file says which rank each has; other programs know neither "
            "that order nor the routers."
        )
    return report_of(source, settings, dtype, 0.0, needs_vae=False, notes=notes)


def _write_static(
    source: Source,
    settings: ExportSection,
    model: DyFluxTransformer2DModel,
    tensors: LazyTensors,
    folder: Path,
    say: Progress,
) -> ExportReport:
    lineage = source.lineage
    kept: LazyTensors = Rearranged(tensors, {key: (Rows(key),) for key in tensors if not is_ours(key)})
    single = lineage.layout == "original"
    if single:
        kept = Rearranged(kept, to_original(kept.specs))
    written = Cast(kept, {"*": settings.dtype} if settings.dtype else lineage.dtypes)
    dtype = commonest_dtype(written)
    say("writing and comparing the static model")
    if not single:
        _static_config(model).save_config(folder)
        write_compared(folder, written, max_shard_size=settings.max_shard_size)
    elif lineage.container == "torch":
        check_space(folder, sum(spec.nbytes for spec in written.specs.values()))
        write_flat(written, folder / "model.pt")
    else:
        write_compared(folder, written, stem=Path(FILE).stem, max_shard_size=None)
    file = None if not single else "model.pt" if lineage.container == "torch" else FILE
    subject = subject_of(source, settings, model.geometry, dtype)
    exact = lineage.untouched and settings.dtype is None
    (folder / "README.md").write_text(flux_static_card(subject, file, exact=exact), encoding="utf-8")
    notes = []
    if lineage.layout is None:
        notes.append(
            "What the source's file looked like is not recorded; the model is written as a folder for diffusers."
        )
    if lineage.quantisation:
        notes.append(
            f"The source held {lineage.quantisation} numbers; the file holds the {dtype} ones they stand for."
        )
    if lineage.steps and set(lineage.dtypes.values()) - {"float32"} and settings.dtype is None:
        notes.append(
            "The fine-tuned weights were rounded to the types of the source's file; --dtype float32 keeps them."
        )
    return report_of(source, settings, dtype, 0.0, needs_vae=False, notes=notes)


def _static_config(model: DyFluxTransformer2DModel) -> Any:
    """The same model as one of diffusers' own class, for its ``config.json``; without weights.

    Raises:
        DyditError: If that class has no such model.
    """
    static: Any = getattr(diffusers, STATIC_CLASS)
    geometry = model.geometry
    if geometry.mlp_hidden != 4 * geometry.hidden_size:
        raise DyditError(
            f"diffusers' {STATIC_CLASS} has no MLPs of {geometry.mlp_hidden} channels.",
            why=f"Its MLPs are four times as wide as the model, which has {geometry.hidden_size} channels.",
            fix="Pass --format diffusers, whose code is in the folder.",
        )
    names = inspect.signature(static.__init__).parameters
    config = {name: value for name, value in model.config.items() if name in names}
    with torch.device("meta"):
        return static(**config)


def without_identity_orders(tensors: LazyTensors) -> LazyTensors:
    """Drop the orders that say nothing: rank r is unit r, as in the authors' files."""

    def says_nothing(key: str) -> bool:
        return key.endswith("_order") and _is_identity(tensors[key])

    return Rearranged(tensors, {key: (Rows(key),) for key in tensors if not says_nothing(key)})


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), dtype=order.dtype))


def check_whole(model: DyFluxTransformer2DModel, tensors: LazyTensors, path: Path) -> None:
    """The stored tensors are those of the configuration.

    Raises:
        DyditError: If they are not.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found: dict[str, TensorSpec] = tensors.specs
    wrong = sorted(
        key
        for key in expected.keys() | found.keys()
        if key not in found or key not in expected or found[key].shape != expected[key]
    )
    if wrong:
        raise DyditError(
            f"The weights in {path} are not those of its config.json.",
            why=f"{len(wrong)} tensors are missing, left over or of another shape ({', '.join(wrong[:3])}).",
            fix="Copy the folder again, or run the stage that wrote it again.",
        )
