"""The pipeline folder of a model that diffusers' pipelines run with the code that lies in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dydit_cli.artifacts import load_model
from dydit_cli.export.card import DYNAMIC, pipeline_card
from dydit_cli.export.flux import STREAMED, check_flux_pipeline, export_flux
from dydit_cli.export.format import Format
from dydit_cli.export.labels import class_names
from dydit_cli.export.parts_card import parts_card
from dydit_cli.export.pipeline import CODE, TRANSFORMER, is_pixel_space, write_pipeline
from dydit_cli.export.refusals import refuse_baked, refuse_budget, refuse_pipeline, refuse_plugin_width
from dydit_cli.export.report import (
    ExportReport,
    Progress,
    Source,
    loaded_and_compared,
    report_of,
    subject_of,
)
from dydit_cli.export.space import check_space
from dydit_cli.export.vae import Vae, find_vae
from dydit_cli.export.verify import reload_difference
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.recipe.schema import ExportSection

PIPELINE_DTYPE = "float32"
PRUNED = "A static {title} from which heads and hidden channels were cut out for good, made by {maker}. It has no routers."


@dataclass(frozen=True)
class Opened:
    """A model on its way into a folder.

    Attributes:
        model: In its family's own convention, in the type to write, at the budget to run at.
        dtype: Name of that type.
        vae: The autoencoder that goes along, if one was named.
    """

    model: DynamicModel
    dtype: str
    vae: Vae | None


@dataclass(frozen=True)
class Told:
    """What a folder says of its model beside the usual, in its card and in the report.

    Attributes:
        steps: Sampling steps of the card's examples.
        introduction: See `Subject`.
        dials: See `Subject`.
        limits: See `Subject`.
        notes: For the report.
        facts: For the report.
        verified: What the comparison says, if it is more than the difference.
    """

    steps: int = 50
    introduction: str = DYNAMIC
    dials: bool = True
    limits: str = ""
    notes: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    verified: Callable[[float], str] = loaded_and_compared


def check_folder(source: Source, settings: ExportSection) -> None:
    """See that a model goes into a folder as the settings say.

    Raises:
        DyditError: For options that the family does not take, an autoencoder that does not fit, and a budget that it does not serve.
    """
    refuse_pipeline(source, settings)
    _vae_of(source, settings)
    refuse_budget(source, settings)


def open_model(source: Source, settings: ExportSection, say: Progress) -> Opened:
    """Load what goes into a folder.

    Raises:
        DyditError: If its weights cannot be read, or do not follow the budget.
    """
    dtype = settings.dtype or PIPELINE_DTYPE
    vae = _vae_of(source, settings)
    say("reading the model")
    model = load_model(
        source.path, torch_dtype=getattr(torch, dtype), convention="native", budget=settings.budget
    )
    if settings.budget is not None:
        model.register_to_config(default_budget=settings.budget)
    return Opened(model, dtype, vae)


def write_folder(
    source: Source,
    settings: ExportSection,
    opened: Opened,
    folder: Path,
    say: Progress,
    *,
    compare: Callable[[Path, Path], float],
    told: Told,
) -> ExportReport:
    """Write a model as a pipeline folder with its card, or as its parts.

    Args:
        source: Where it comes from.
        settings: The recipe's section.
        opened: What to write.
        folder: An empty folder.
        say: Called as work goes on.
        compare: Loads what was written, given the transformer's folder and the file of code in it, and returns the largest
            difference.
        told: What the folder says of its model.
    """
    model, dtype, vae = opened.model, opened.dtype, opened.vae
    check_space(folder, nbytes_of(model) + (vae.nbytes if vae else 0))
    say("writing the pipeline")
    names = class_names(source.lineage, model.geometry.num_classes)
    write_pipeline(model, folder, vae=vae, names=names, max_shard_size=settings.max_shard_size)
    say("verifying the pipeline against the model")
    transformer = folder / TRANSFORMER
    difference = compare(transformer, transformer / CODE)
    needs_vae = vae is None and not is_pixel_space(model)
    subject = replace(
        subject_of(source, settings, model.geometry, dtype),
        steps=told.steps,
        introduction=told.introduction,
        dials=told.dials,
        limits=told.limits,
    )
    identity = vae is None and not needs_vae
    if source.family.stock_pipeline is None:
        card = parts_card(subject, needs_vae=needs_vae, names=names)
    else:
        card = pipeline_card(subject, needs_vae=needs_vae, is_identity=identity, names=names)
    (folder / "README.md").write_text(card, encoding="utf-8")
    notes = list(told.notes)
    if source.family.stock_pipeline is None:
        notes.append(
            f"diffusers has no pipeline for this form of {source.family.title}: the folder holds transformer and scheduler, and its "
            "README.md the few lines that sample with them."
        )
    if needs_vae and source.family.stock_pipeline is None:
        notes.append(
            "The model draws latents: decode its frames with the autoencoder that it was trained with."
        )
    elif needs_vae:
        notes.append(
            "The model draws latents and the folder has no autoencoder: pass one when you load it (vae=...), or export with --vae DIR."
        )
    return report_of(
        source,
        settings,
        dtype,
        difference,
        needs_vae=needs_vae,
        notes=notes,
        verified=told.verified(difference),
        facts=told.facts,
    )


def _vae_of(source: Source, settings: ExportSection) -> Vae | None:
    return find_vae(settings.vae, int(source.config["in_channels"])) if settings.vae else None


def nbytes_of(model: DynamicModel) -> int:
    """Bytes of what is stored of a model."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def check_diffusers(source: Source, settings: ExportSection) -> None:
    """Refuse what is no pipeline folder with dydit's own code.

    Raises:
        DyditError: For everything that can be known without the weights.
    """
    # The code that goes along is made of the package's own modules.
    refuse_plugin_width(source, settings)
    if source.family.objective == STREAMED:
        check_flux_pipeline(source, settings)
        return
    refuse_baked(source)
    check_folder(source, settings)


def write_diffusers(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write a pipeline folder, load it with its own code and compare.

    Raises:
        DyditError: For everything that a user can put right.
    """
    if source.family.objective == STREAMED:
        return export_flux(source, settings, folder, say)
    opened = open_model(source, settings, say)

    def compare(transformer: Path, code: Path) -> float:
        return reload_difference(opened.model.float(), transformer, code)

    is_pruned = source.config.get("block_heads") is not None
    told = Told(introduction=PRUNED, dials=False) if is_pruned else Told()
    return write_folder(source, settings, opened, folder, say, compare=compare, told=told)


DIFFUSERS = Format(
    name="diffusers",
    summary="a pipeline folder",
    families=("dit", "sit", "latte", "flux"),
    check=check_diffusers,
    write=write_diffusers,
)
