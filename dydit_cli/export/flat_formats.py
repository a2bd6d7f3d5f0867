"""The formats of one flat file: the original layout with routers, and the complete model as its source was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dydit_cli.artifacts.loading import model_folder
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError
from dydit_cli.export.card import original_card, static_card
from dydit_cli.export.diffusers_dit import DIFFUSERS_FILE, write_class_config
from dydit_cli.export.flat import FILES, cast, is_order, static_part, without_identity_orders, write_flat
from dydit_cli.export.flux import STREAMED, check_flux_file, export_flux
from dydit_cli.export.format import Format
from dydit_cli.export.refusals import (
    refuse_baked,
    refuse_following_timestep,
    refuse_measured,
    refuse_parts,
    refuse_pipeline,
    refuse_plugin_width,
)
from dydit_cli.export.report import ExportReport, Progress, Source, report_of, subject_of
from dydit_cli.export.skeleton import skeleton
from dydit_cli.export.space import check_space
from dydit_cli.families.dit_files import to_diffusers
from dydit_cli.recipe.schema import ExportSection


def check_flat_format(source: Source, settings: ExportSection) -> None:
    """Refuse what one flat file cannot hold.

    Raises:
        DyditError: For everything that can be known without the weights.
    """
    refuse_following_timestep(source, settings)
    if settings.format == "static":
        refuse_measured(settings)
    else:
        refuse_plugin_width(source, settings)
    if source.family.objective == STREAMED:
        check_flux_file(source, settings)
        return
    refuse_pipeline(source, settings)
    refuse_parts(settings)
    if settings.budget is not None:
        raise DyditError(
            f"The {settings.format} format knows no budget.",
            why="A budget is told to the routers that a pipeline runs.",
            fix="Leave --budget out, or export with --format diffusers.",
        )
    if source.config.get("block_heads") is not None:
        raise DyditError(
            "A pruned model cannot be written in the original layout.",
            why="Its blocks have widths of their own, which the original code does not know: it would refuse the shapes.",
            fix="Pass --format diffusers: that folder carries the code that it needs.",
        )
    if settings.format == "original":
        _refuse_routers_of_ours(source)
        _refuse_diffusers_form(source)


def write_flat_format(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write one flat file, read it back and compare.

    Raises:
        DyditError: For everything that a user can put right.
    """
    if source.family.objective == STREAMED:
        return export_flux(source, settings, folder, say)
    diffusers_form = _of_diffusers_form(source)
    say("reading the model")
    tensors = read_checkpoint(model_folder(source.path)).tensors
    notes = []
    if settings.format == "static":
        tensors, file = static_part(tensors), FILES[source.lineage.container]
        dtypes = source.lineage.dtypes
        if diffusers_form:
            tensors, file = to_diffusers(tensors), DIFFUSERS_FILE
        if source.lineage.steps and set(dtypes.values()) - {"float32"} and settings.dtype is None:
            notes.append(
                "The fine-tuned weights were rounded to the types of the source's file; --dtype float32 keeps them."
            )
    else:
        tensors, file = without_identity_orders(source.family.write(tensors)), FILES["torch"]
        dtypes = {}
    ordered = any(is_order(key) for key in tensors)
    if ordered:
        notes.append(
            "The units keep the order of the static checkpoint and the file says which rank each has; the authors' code knows no "
            "such order and will refuse it."
        )
    tensors = cast(tensors, {"*": settings.dtype} if settings.dtype else dtypes)
    check_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    say(f"writing and comparing {file}")
    write_flat(tensors, folder / file)
    if diffusers_form:
        write_class_config(folder, source.config)
    dtype = _commonest_dtype(tensors)
    subject = subject_of(source, settings, skeleton(source).geometry, dtype)
    exact = source.lineage.untouched and settings.dtype is None
    card = (
        static_card(subject, file, exact=exact, diffusers=diffusers_form)
        if settings.format == "static"
        else original_card(subject, file, ordered=ordered)
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report_of(source, settings, dtype, 0.0, needs_vae=False, notes=notes)


def _commonest_dtype(tensors: Mapping[str, Tensor]) -> str:
    counted = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return counted.most_common(1)[0][0]


def _of_diffusers_form(source: Source) -> bool:
    """Whether a model came from diffusers' DiT, another function of the same numbers (see `families/dit_files.py`)."""
    return bool(source.config.get("frequency_shift"))


def _refuse_diffusers_form(source: Source) -> None:
    if _of_diffusers_form(source):
        raise DyditError(
            "A model that came from diffusers' DiT cannot be written in the original layout.",
            why="Its timestep frequencies and an epsilon differ from the original's, which no file in that layout can say.",
            fix="Pass --format diffusers, or --format static for the folder of diffusers' own class.",
        )


def _refuse_routers_of_ours(source: Source) -> None:
    refuse_baked(source)
    if source.config.get("budgets") is not None:
        raise DyditError(
            "A model with budgets cannot be written in the original layout.",
            why="The authors' routers know one ratio, and their code would ignore what a budget tells ours.",
            fix="Pass --format diffusers, or --format static for the complete model.",
        )
    if source.config.get("width", "free") == "ordered":
        raise DyditError(
            "A model of ordered width cannot be written in the original layout.",
            why="The authors' routers have a row a unit; here a row is a step between two units, and would be misread.",
            fix="Pass --format diffusers, or --format static for the complete model.",
        )


ORIGINAL = Format(
    name="original",
    summary="one file, with routers",
    families=("dit", "sit", "latte", "flux"),
    check=check_flat_format,
    write=write_flat_format,
)

STATIC = Format(
    name="static",
    summary="the complete model again",
    families=("dit", "sit", "latte", "flux"),
    check=check_flat_format,
    write=write_flat_format,
)
