"""Make a static checkpoint dynamic: read, rank, insert routers, write, verify."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import artifact_folder, save_model, write_json, write_manifest
from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.checkpoints import Checkpoint, open_checkpoint
from dydit_cli.checkpoints.builtin import PREFIX, builtin_models
from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.checkpoints.locating import located, terms_of_name
from dydit_cli.conversion.calibration import (
    Calibration,
    calibrate_folder,
    calibrate_model,
    check_calibration,
    write_tables,
)
from dydit_cli.conversion.importance import (
    PLUGGED_RANKINGS,
    RANKINGS,
    Importance,
    RankingRequest,
    magnitude,
    random,
    read_importance,
    taylor,
    write_importance,
)
from dydit_cli.conversion.insertion import build_from, order_of, set_order
from dydit_cli.conversion.order import Grouping, order_units
from dydit_cli.conversion.pruning import (
    PruningReport,
    check_prunable,
    choose_units,
    prune_model,
    pruning_report,
    verify_pruned,
)
from dydit_cli.conversion.streamed import write_streamed
from dydit_cli.conversion.verification import Verification, verify
from dydit_cli.data import open_data
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family, Hints, Source, require
from dydit_cli.families.registry import FAMILIES, family_named, family_of
from dydit_cli.flops import macs_of, ratio_floor
from dydit_cli.objectives import objective_of

STREAMED = "rectified-flow"
"""Objective of the families whose weights pass one by one: FLUX, whose files may be larger than memory."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, all)."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        out: The artifact.
        family: Name of the family.
        source: Path, copy and container of the checkpoint, its number of tensors and their types.
        geometry: Numbers of the model.
        params: ``static``, ``routers`` and ``total`` parameters.
        importance: Method, or "imported" where the file had routers already.
        static_gmacs: Of one forward pass of one image, LayerNorm included.
        ratio_floor: The least target that training can be given.
        verification: Largest differences between source and artifact.
        loras: FLUX: adapters that were merged, with the number of layers that each changed.
        pruning: What was cut out for good, of a pruned model, which is static.
        calibration: What the width routers were set to, of a calibrated model.
    """

    out: str
    family: str
    source: dict[str, Any]
    geometry: dict[str, int]
    params: dict[str, int]
    importance: str
    grouping: str
    static_gmacs: float
    ratio_floor: float
    verification: Verification
    loras: tuple[dict[str, Any], ...] = ()
    pruning: PruningReport | None = None
    calibration: Calibration | None = None


def convert(
    checkpoint: str | Path | Checkpoint,
    *,
    out: str | Path,
    family: str = "auto",
    num_heads: int | None = None,
    num_groups: int | None = None,
    grouping: Grouping = "sorted",
    width: str = "free",
    lora: Sequence[str] = (),
    axes_dims_rope: Sequence[int] | None = None,
    prune: float | None = None,
    importance: str = "auto",
    importance_samples: int = 256,
    data: str | Path | None = None,
    calibrate: str | Path | None = None,
    calibrate_ratio: float = 0.8,
    calibrate_samples: int = 128,
    calibrate_ranges: int = 8,
    seed: int = 0,
    device: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    recipe_yaml: str | None = None,
    on_progress: Progress | None = None,
) -> ConversionReport:
    """Turn a trained static DiT, SiT, Latte or FLUX, or one of the authors' dynamic models, into an artifact that `load_model` loads.

    All units start switched on, so that the result computes what the source computes; it becomes faster by fine-tuning. With
    ``calibrate``, widths start where training is to bring them, and the result is faster at once.

    Args:
        checkpoint: File, folder, ``builtin:NAME``, repository of the Hub (``owner/name``, which is downloaded), or what
            `open_checkpoint` or `read_checkpoint` returned.
        out: Folder of the artifact.
        family: ``dit``, ``sit``, or ``auto`` where the file alone decides.
        num_heads: Attention heads, where the width is not a published one.
        num_groups: MLP channel groups; as many as heads by default.
        grouping: ``sorted`` or ``contiguous`` channel groups.
        width: ``free`` or ``ordered`` masks of heads and groups.
        lora: FLUX: adapters merged before the ranking, ``FILE:SCALE`` each.
        axes_dims_rope: FLUX: how a head's channels are shared among the rotary axes, where heads have other than 128.
        prune: Make a static model instead: cut the least important heads and channels out for good, until this share of attention and
            MLP MACs is left.
        importance: ``magnitude``, ``taylor``, ``random``, or scores of an earlier conversion (file or folder); ``auto`` is
            ``magnitude``, and with ``calibrate`` ``taylor``.
        importance_samples: Samples of the Taylor ranking.
        data: Training data; only the Taylor ranking needs it, and takes those of ``calibrate`` without it.
        calibrate: Training data on which the width routers are set: each range of timesteps keeps the units that it needs.
        calibrate_ratio: λ, the share of attention and MLP MACs that they leave.
        calibrate_samples: Samples of each round of the measurement.
        calibrate_ranges: Ranges of timesteps.
        seed: Of routers, random and Taylor rankings, and calibration.
        device: Where the Taylor ranking and the calibration run.
        max_shard_size: Of the weight files.
        overwrite: Whether to replace ``out``.
        recipe_yaml: The resolved recipe, to be kept in the artifact.
        on_progress: Called as work goes on.

    Raises:
        DyditError: For everything that a user can put right.
    """
    out = Path(out)
    refuse_existing(out, overwrite)
    say = on_progress or _silent
    say("reading the checkpoint", 0, 1)
    axes = None if axes_dims_rope is None else tuple(axes_dims_rope)
    read, hints = _read(checkpoint, Hints(num_heads, num_groups, axes), say)
    chosen = choose_family(read, _builtin_family(checkpoint) if family == "auto" else family)
    source = chosen.read(read.tensors, replace(hints, config={**read.config, **hints.config}))
    source = replace(source, config={**source.config, **_builtin_sizes(checkpoint, chosen)})
    if prune is not None:
        check_prunable(chosen, source, width)
    if importance == "auto":
        # Groups that are cut by what data say lose less: a fifth of the channels that are cut last is nearly free.
        importance = "magnitude" if calibrate is None else "taylor"
    if importance == "taylor" and data is None:
        data = calibrate
    if calibrate is not None:
        check_calibration(chosen, source, prune)
    if width != "free":
        source = _with_width(chosen, source, width)
    if lora and chosen.objective != STREAMED:
        raise DyditError(
            f"LoRAs cannot be merged into a {chosen.title}.",
            why="Adapter files are read for FLUX, whose layers they name.",
            fix="Leave out --lora, or merge it before.",
        )
    settings: dict[str, Any] = {
        "checkpoint": str(read.path),
        "family": chosen.name,
        "grouping": grouping,
        "width": width,
        "lora": list(lora),
        "prune": prune,
        "importance": importance,
        "importance_samples": importance_samples,
        "data": None if data is None else str(data),
        "calibrate": None if calibrate is None else str(calibrate),
        "calibrate_ratio": calibrate_ratio,
        "calibrate_samples": calibrate_samples,
        "calibrate_ranges": calibrate_ranges,
        "seed": seed,
        "max_shard_size": max_shard_size,
    }
    if chosen.objective == STREAMED:
        with artifact_folder(out, overwrite=overwrite) as folder:
            written = write_streamed(
                folder,
                chosen,
                source,
                loras=lora,
                importance=importance,
                importance_samples=importance_samples,
                data=data,
                grouping=grouping,
                seed=seed,
                device=device,
                max_shard_size=max_shard_size,
                say=say,
            )
            report = _report(
                out, chosen, read, written.model, written.importance, grouping, written.verification
            )
            report = replace(report, loras=tuple(asdict(each) for each in written.loras))
            if calibrate is not None:
                made = calibrate_folder(
                    folder,
                    calibrate,
                    target=calibrate_ratio,
                    samples=calibrate_samples,
                    ranges=calibrate_ranges,
                    seed=seed,
                    device=device,
                    on_progress=say,
                )
                write_tables(folder, made.tables)
                report = replace(report, calibration=made.report)
            _explain(folder, report, settings, read.path, recipe_yaml)
        return report
    model = build_from(chosen, source, seed)
    _refuse_broken_weights(read)
    say("ranking heads and channels", 0, 1)
    if source.dynamic:
        # Trained routers address the units in the order that the file gives them.
        scores, order = None, order_of(model)
    else:
        scores = rank(
            model,
            importance,
            samples=importance_samples,
            data=data,
            seed=seed,
            device=device,
            on_progress=say,
        )
        order = order_units(scores.heads, scores.channels, model.geometry.num_groups, grouping)
        set_order(model, order)
    calibrated = None
    if calibrate is not None:
        calibrated = calibrate_model(
            model,
            calibrate,
            target=calibrate_ratio,
            samples=calibrate_samples,
            ranges=calibrate_ranges,
            seed=seed,
            device=device,
            on_progress=say,
        )
    with artifact_folder(out, overwrite=overwrite) as folder:
        say("writing the model", 0, 1)
        pruning = None if prune is None or scores is None else choose_units(scores, model.geometry, prune)
        made = model if pruning is None else prune_model(chosen, source, pruning)
        save_model(made, folder, max_shard_size)
        if scores is not None:
            write_importance(folder, scores, order)
        if calibrated is not None:
            write_tables(folder, calibrated.tables)
        say("verifying against the source", 0, 1)
        if pruning is None:
            tensors = {key: tensor for key, tensor in source.tensors.items() if not key.endswith("_order")}
            verification = verify(folder, tensors, seed)
        else:
            verification = verify_pruned(folder, model, pruning, seed)
        method = scores.method if scores is not None else "imported"
        report = _report(out, chosen, read, made, method, order.grouping, verification)
        if pruning is not None:
            report = replace(report, pruning=pruning_report(model, made, pruning))
        if calibrated is not None:
            report = replace(report, calibration=calibrated.report)
        _explain(folder, report, settings, read.path, recipe_yaml)
    return report


def _explain(
    folder: Path, report: ConversionReport, settings: dict[str, Any], parent: Path, recipe_yaml: str | None
) -> None:
    """Write the report, the manifest and the recipe into the artifact."""
    write_json(folder / "report.json", asdict(report))
    units = {name: report.geometry[name] for name in ("num_heads", "num_groups")}
    write_manifest(
        folder, stage="convert", settings={**settings, **units}, parent=parent, results=asdict(report)
    )
    if recipe_yaml is not None:
        (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")


def _with_width(family: Family, source: Source, width: str) -> Source:
    """The source with routers of another kind.

    Raises:
        DyditError: If it has routers already, or is of a family that has one kind.
    """
    if source.dynamic:
        raise DyditError(
            f"The width of this file cannot be {width}.",
            why="Its trained routers choose units freely.",
            fix="Leave width out, or convert the static checkpoint.",
        )
    if "width" not in signature(family.model_class.__init__).parameters:
        raise DyditError(
            f"A {family.title} has no width '{width}'.",
            why="Its blocks have routers of one kind.",
            fix="Leave width out.",
        )
    return replace(source, config={**source.config, "width": width})


def _refuse_broken_weights(checkpoint: Checkpoint) -> None:
    for key, tensor in checkpoint.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DyditError(
                f"{checkpoint.path} holds weights that are not numbers.",
                why=f"'{key}' has NaN or infinite values: the training that wrote it had diverged, or the file is damaged.",
                fix="Bring an earlier checkpoint of that run.",
            )


def candidate_families(checkpoint: Checkpoint) -> list[Family]:
    """The families whose layout the tensors have; a static DiT and a SiT look the same."""
    return [family for family in FAMILIES if family.recognises(checkpoint.tensors)]


def choose_family(checkpoint: Checkpoint, name: str) -> Family:
    """Return the family to read a checkpoint as.

    Raises:
        DyditError: If the file is of none, not of the named one, could be of several, or was converted already.
    """
    if any("_router." in key for key in checkpoint.tensors):
        raise DyditError(
            f"{checkpoint.path} is dynamic already.",
            why="It holds routers under dydit's own names: it is the weights of an artifact.",
            fix="Pass its folder as --model to the next stage; to start over, convert the static checkpoint again.",
        )
    candidates = candidate_families(checkpoint)
    if name != "auto":
        family = family_named(name)
        if family in candidates:
            return family
    if len(candidates) == 1 and name == "auto":
        return candidates[0]
    names = ", ".join(candidate.name for candidate in candidates)
    if name == "auto" and candidates:
        raise DyditError(
            f"{checkpoint.path} could be any of: {names}.",
            why="Their files have the same keys and shapes; only who trained the model knows which it is.",
            fix=f"Pass --family {' or --family '.join(candidate.name for candidate in candidates)}.",
        )
    title = family_named(name).title if name != "auto" else "model of a known family"
    raise DyditError(
        f"{checkpoint.path} is not a {title}.",
        why=f"Its keys fit {names if names else 'none of: ' + ', '.join(family.name for family in FAMILIES)}; they begin with "
        f"{', '.join(list(checkpoint.tensors)[:3])}.",
        fix=f"Pass --family {candidates[0].name}." if candidates else _layout_advice(checkpoint),
    )


def _layout_advice(checkpoint: Checkpoint) -> str:
    if any(key.startswith("transformer_blocks.") for key in checkpoint.tensors):
        return "This is a diffusers layout; bring the file in the original repository's layout."
    return "Bring the model's weights in the original repository's layout."


def rank(
    model: DynamicModel,
    importance: str,
    *,
    samples: int,
    data: str | Path | None,
    seed: int,
    device: str,
    on_progress: Progress,
) -> Importance:
    """Score the units of a model by a named ranking, or read scores from a file.

    Raises:
        DyditError: If the ranking is not known, or Taylor has no data.
    """
    if importance == "magnitude":
        return magnitude(model)
    if importance == "random":
        return random(model.geometry, seed)
    if importance == "taylor":
        require(family_of(model), "--importance taylor")
        if data is None:
            raise DyditError(
                "The Taylor ranking needs data.",
                why="It measures how the loss reacts to each unit on training samples.",
                fix="Pass --data, or --importance magnitude, which needs none.",
            )
        split = open_data(data, geometry=model.geometry)
        model.requires_grad_(False).to(find_device(device))
        scores = taylor(
            model,
            split.train,
            objective_of(model),
            samples=samples,
            seed=seed,
            on_progress=lambda done, total: on_progress("ranking heads and channels", done, total),
        )
        model.to("cpu")
        return scores
    if importance in PLUGGED_RANKINGS:
        return PLUGGED_RANKINGS[importance](model, RankingRequest(data, samples, seed, device))
    if Path(importance).exists():
        return read_importance(importance, model.geometry)
    known = (*RANKINGS, *PLUGGED_RANKINGS)
    raise DyditError(
        f"There is no importance ranking called '{importance}'.",
        why=f"It is neither one of {', '.join(known)} nor an existing file of scores.",
        fix=did_you_mean(importance, known) or "Pass one of these.",
    )


def _read(checkpoint: str | Path | Checkpoint, hints: Hints, say: Progress) -> tuple[Checkpoint, Hints]:
    """Read a checkpoint; what is known of a shipped one fills in what its user did not say."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint, hints
    place = located(checkpoint, lambda what: say(what, 0, 1))
    opened = replace(open_checkpoint(place), terms=terms_of_name(checkpoint, place))
    config = _builtin_config(checkpoint)
    heads = hints.num_heads or config.get("num_heads")
    axes = hints.axes_dims_rope or config.get("axes_dims_rope")
    return opened, replace(hints, num_heads=heads, axes_dims_rope=axes)


def _builtin_config(checkpoint: str | Path | Checkpoint) -> dict[str, Any]:
    """What is known of a shipped model beside its tensors."""
    if isinstance(checkpoint, Checkpoint) or not str(checkpoint).startswith(PREFIX):
        return {}
    config = builtin_models().get(str(checkpoint).removeprefix(PREFIX), {}).get("config")
    return dict(config) if isinstance(config, dict) else {}


def _builtin_sizes(checkpoint: str | Path | Checkpoint, family: Family) -> dict[str, Any]:
    """The reference resolution of a shipped FLUX, which no tensor of it tells."""
    if family.objective != STREAMED:
        return {}
    config = _builtin_config(checkpoint)
    return {name: config[name] for name in ("sample_size", "text_tokens") if name in config}


def _builtin_family(checkpoint: str | Path | Checkpoint) -> str:
    if isinstance(checkpoint, Checkpoint) or not str(checkpoint).startswith(PREFIX):
        return "auto"
    facts = builtin_models().get(str(checkpoint).removeprefix(PREFIX), {})
    return str(facts.get("family", "auto"))


def _report(
    out: Path,
    family: Family,
    read: Checkpoint,
    model: DynamicModel,
    importance: str,
    grouping: str,
    verification: Verification,
) -> ConversionReport:
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return ConversionReport(
        out=str(out),
        family=family.name,
        source={
            "path": str(read.path),
            "copy": read.copy,
            "container": read.container,
            "layout": family.layout(read.tensors),
            "quantisation": read.quantisation,
            "tensors": len(read.tensors),
            "dtypes": dtypes_of(read),
            "terms": read.terms.as_json(),
        },
        geometry=asdict(model.geometry),
        params={"static": total - routers, "routers": routers, "total": total},
        importance=importance,
        grouping=grouping,
        static_gmacs=macs_of(model.geometry).total / 1e9,
        ratio_floor=ratio_floor(model.geometry),
        verification=verification,
    )


def dtypes_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The commonest type of the tensors under ``*``, and the keys that have another: what a static export restores."""
    specs = lazily(checkpoint.tensors).specs
    names = {key: str(spec.dtype).removeprefix("torch.") for key, spec in specs.items()}
    common = Counter(names.values()).most_common(1)[0][0]
    return {"*": common} | {key: name for key, name in names.items() if name != common}


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
