"""Export a dynamic model: read its past, write one of three formats, verify what was written."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.artifacts import artifact_folder, load_model, model_config, write_manifest
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError
from dydit_cli.export.card import original_card, pipeline_card, static_card
from dydit_cli.export.diffusers_dit import DIFFUSERS_FILE, write_class_config
from dydit_cli.export.flat import FILES, cast, is_order, static_part, without_identity_orders, write_flat
from dydit_cli.export.flux import STREAMED, export_flux
from dydit_cli.export.labels import class_names
from dydit_cli.export.lineage import lineage_of
from dydit_cli.export.parts_card import parts_card
from dydit_cli.export.pipeline import CODE, TRANSFORMER, is_pixel_space, write_pipeline
from dydit_cli.export.report import ExportReport, Progress, Source, report_of, subject_of
from dydit_cli.export.vae import find_vae
from dydit_cli.export.verify import reload_difference
from dydit_cli.families.dit_files import to_diffusers
from dydit_cli.families.family import Family, require
from dydit_cli.families.registry import class_named, family_named
from dydit_cli.plugged import provider_of
from dydit_cli.recipe.schema import ExportSection

PIPELINE_DTYPE = "float32"
SPARE_BYTES = 1 << 20
"""Configurations, code and card."""


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
    say = on_progress or _silent
    model, out = Path(settings.model).expanduser(), Path(settings.out)
    _refuse_own_source(out, model)
    refuse_existing(out, settings.overwrite)
    config = model_config(model)
    source = Source(model, config, _family(str(config["_class_name"])), lineage_of(model))
    require(source.family, "dydit export")
    _refuse_following_timestep(source, settings)
    write: Callable[[Source, ExportSection, Path, Progress], ExportReport]
    if source.family.objective == STREAMED:
        write = export_flux
    else:
        _refuse_pipeline(source, settings)
        write = _write_pipeline if settings.format == "diffusers" else _write_flat
    with artifact_folder(out, overwrite=settings.overwrite) as folder:
        report = write(source, settings, folder, say)
        weights = [file for file in sorted(folder.rglob("*")) if file.suffix in (".safetensors", ".pt")]
        hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in weights}
        if recipe_yaml is not None:
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        report = replace(report, sha256=hashes, files=_files(folder))
        write_manifest(
            folder,
            stage="export",
            settings=settings.model_dump(mode="json"),
            parent=settings.model,
            results={**asdict(report), "lineage": asdict(source.lineage)},
        )
    return report


def _write_pipeline(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    dtype = settings.dtype or PIPELINE_DTYPE
    width = str(source.config.get("width", "free"))
    if provider_of("width", width) is not None:
        raise DyditError(
            f"A model with routers of the kind '{width}' cannot be exported with its code.",
            why="The code that goes along is made of dydit's own modules, and these routers come from a plug-in of yours.",
            fix="Pass --format static for the complete model, or keep using the artifact with --plugin.",
        )
    vae = find_vae(settings.vae, int(source.config["in_channels"])) if settings.vae else None
    say("reading the model")
    model = load_model(
        source.path, torch_dtype=getattr(torch, dtype), convention="native", budget=settings.budget
    )
    if settings.budget is not None:
        model.register_to_config(default_budget=settings.budget)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    _check_space(folder, weights + (vae.nbytes if vae else 0))
    say("writing the pipeline")
    names = class_names(source.lineage, model.geometry.num_classes)
    write_pipeline(model, folder, vae=vae, names=names, max_shard_size=settings.max_shard_size)
    say("verifying the pipeline against the model")
    transformer = folder / TRANSFORMER
    difference = reload_difference(model.float(), transformer, transformer / CODE)
    needs_vae = vae is None and not is_pixel_space(model)
    subject = subject_of(source, settings, model.geometry, dtype)
    identity = vae is None and not needs_vae
    if source.family.stock_pipeline is None:
        card = parts_card(subject, needs_vae=needs_vae, names=names)
    else:
        card = pipeline_card(subject, needs_vae=needs_vae, is_identity=identity, names=names)
    (folder / "README.md").write_text(card, encoding="utf-8")
    notes = []
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
    return report_of(source, settings, dtype, difference, needs_vae=needs_vae, notes=notes)


def _write_flat(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    if settings.vae:
        raise DyditError(
            f"The {settings.format} format takes no autoencoder.",
            why="It is one file with the transformer's weights.",
            fix="Leave --vae out, or export with --format diffusers.",
        )
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
    # diffusers' DiT is another function of the same numbers than the original (see `families/dit_files.py`).
    diffusers_form = bool(source.config.get("frequency_shift"))
    if diffusers_form and settings.format == "original":
        raise DyditError(
            "A model that came from diffusers' DiT cannot be written in the original layout.",
            why="Its timestep frequencies and an epsilon differ from the original's, which no file in that layout can say.",
            fix="Pass --format diffusers, or --format static for the folder of diffusers' own class.",
        )
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
        _refuse_routers_of_ours(source)
        tensors, file = without_identity_orders(source.family.write(tensors)), FILES["torch"]
        dtypes = {}
    ordered = any(is_order(key) for key in tensors)
    if ordered:
        notes.append(
            "The units keep the order of the static checkpoint and the file says which rank each has; the authors' code knows no "
            "such order and will refuse it."
        )
    tensors = cast(tensors, {"*": settings.dtype} if settings.dtype else dtypes)
    _check_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    say(f"writing and comparing {file}")
    write_flat(tensors, folder / file)
    if diffusers_form:
        write_class_config(folder, source.config)
    dtype = _commonest_dtype(tensors)
    model_class = source.family.model_class
    with torch.device("meta"):
        geometry = model_class(
            **{key: value for key, value in source.config.items() if not key.startswith("_")}
        ).geometry
    subject = subject_of(source, settings, geometry, dtype)
    exact = source.lineage.base is not None and source.lineage.steps is None and settings.dtype is None
    card = (
        static_card(subject, file, exact=exact, diffusers=diffusers_form)
        if settings.format == "static"
        else original_card(subject, file, ordered=ordered)
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report_of(source, settings, dtype, 0.0, needs_vae=False, notes=notes)


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


def _commonest_dtype(tensors: Mapping[str, Tensor]) -> str:
    counted = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return counted.most_common(1)[0][0]


def _refuse_routers_of_ours(source: Source) -> None:
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


def _refuse_following_timestep(source: Source, settings: ExportSection) -> None:
    if source.config.get("td_lora") is not None and settings.format != "diffusers":
        raise DyditError(
            f"A model trained with TD-LoRA cannot be written in the {settings.format} format.",
            why="Its weights are others at each timestep, and that format has one of each.",
            fix="Pass --format diffusers, which ships the experts and the code that mixes them; or train with method lora, whose "
            "adapters are merged.",
        )


def _refuse_pipeline(source: Source, settings: ExportSection) -> None:
    if settings.pipeline is not None:
        raise DyditError(
            f"A {source.family.title} takes no --pipeline.",
            why="Text encoders and tokenizers are parts of text-to-image models (FLUX); this family is told classes by number.",
            fix="Leave --pipeline out; --vae DIR brings an autoencoder.",
        )


def _refuse_own_source(out: Path, model: Path) -> None:
    """Replacing an export must not replace what is exported.

    Raises:
        DyditError: If ``out`` is the model's folder, or holds it.
    """
    if out.resolve() == model.resolve() or out.resolve() in model.resolve().parents:
        raise DyditError(
            f"{out} is, or holds, the model that is to be exported.",
            why="The export would replace what it reads.",
            fix="Choose another --out.",
        )


def _check_space(folder: Path, needed: int) -> None:
    """Raise before writing gigabytes that will not fit.

    Raises:
        DyditError: If less is free than will be written.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise DyditError(
            f"The export needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free.",
            why="The weights are written whole before anything is replaced.",
            fix="Free space, choose another --out, or write a smaller type with --dtype bfloat16.",
        )


def _silent(what: str) -> None:
    """Progress that nobody watches."""
