"""Make a static checkpoint dynamic: read, rank, insert routers, write, verify."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import artifact_folder, save_model, write_json, write_manifest
from dydit_cli.artifacts.writing import refuse_existing
from dydit_cli.checkpoints import Checkpoint, read_checkpoint
from dydit_cli.checkpoints.builtin import PREFIX, builtin_models, builtin_path
from dydit_cli.conversion.importance import (
    RANKINGS,
    Importance,
    magnitude,
    random,
    read_importance,
    taylor,
    write_importance,
)
from dydit_cli.conversion.insertion import build_from, order_of, set_order
from dydit_cli.conversion.order import Grouping, UnitOrder, order_units
from dydit_cli.conversion.verification import Verification, verify
from dydit_cli.data import open_data
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family, Hints
from dydit_cli.families.registry import FAMILIES, family_named
from dydit_cli.flops import macs_of, ratio_floor
from dydit_cli.objectives import objective_for

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


def convert(
    checkpoint: str | Path | Checkpoint,
    *,
    out: str | Path,
    family: str = "auto",
    num_heads: int | None = None,
    num_groups: int | None = None,
    grouping: Grouping = "sorted",
    importance: str = "magnitude",
    importance_samples: int = 256,
    data: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    recipe_yaml: str | None = None,
    on_progress: Progress | None = None,
) -> ConversionReport:
    """Turn a trained static DiT or SiT, or the authors' dynamic DiT, into an artifact that `load_model` loads.

    All units start switched on, so that the result computes what the source computes; it becomes faster by fine-tuning.

    Args:
        checkpoint: File, folder, ``builtin:NAME``, or what `read_checkpoint` returned.
        out: Folder of the artifact.
        family: ``dit``, ``sit``, or ``auto`` where the file alone decides.
        num_heads: Attention heads, where the width is not a published one.
        num_groups: MLP channel groups; as many as heads by default.
        grouping: ``sorted`` or ``contiguous`` channel groups.
        importance: ``magnitude``, ``taylor``, ``random``, or scores of an earlier conversion (file or folder).
        importance_samples: Samples of the Taylor ranking.
        data: Training data; only the Taylor ranking needs it.
        seed: Of routers, random and Taylor rankings.
        device: Where the Taylor ranking runs.
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
    read, hints = _read(checkpoint, Hints(num_heads, num_groups))
    chosen = choose_family(read, _builtin_family(checkpoint) if family == "auto" else family)
    source = chosen.read(read.tensors, hints)
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
    with artifact_folder(out, overwrite=overwrite) as folder:
        say("writing the model", 0, 1)
        save_model(model, folder, max_shard_size)
        if scores is not None:
            write_importance(folder, scores, order)
        say("verifying against the source", 0, 1)
        tensors = {key: tensor for key, tensor in source.tensors.items() if not key.endswith("_order")}
        report = _report(out, chosen, read, model, scores, order, verify(folder, tensors, seed))
        write_json(folder / "report.json", asdict(report))
        settings = {
            "checkpoint": str(read.path),
            "family": chosen.name,
            "num_heads": model.geometry.num_heads,
            "num_groups": model.geometry.num_groups,
            "grouping": grouping,
            "importance": importance,
            "importance_samples": importance_samples,
            "data": None if data is None else str(data),
            "seed": seed,
            "max_shard_size": max_shard_size,
        }
        write_manifest(folder, stage="convert", settings=settings, parent=read.path, results=asdict(report))
        if recipe_yaml is not None:
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    return report


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
            objective_for(model.family),
            samples=samples,
            seed=seed,
            on_progress=lambda done, total: on_progress("ranking heads and channels", done, total),
        )
        model.to("cpu")
        return scores
    if Path(importance).exists():
        return read_importance(importance, model.geometry)
    raise DyditError(
        f"There is no importance ranking called '{importance}'.",
        why=f"It is neither one of {', '.join(RANKINGS)} nor an existing file of scores.",
        fix=did_you_mean(importance, RANKINGS) or "Pass one of these.",
    )


def _read(checkpoint: str | Path | Checkpoint, hints: Hints) -> tuple[Checkpoint, Hints]:
    """Read a checkpoint; what is known of a shipped one fills in what its user did not say."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint, hints
    if not str(checkpoint).startswith(PREFIX):
        return read_checkpoint(Path(checkpoint).expanduser()), hints
    name = str(checkpoint).removeprefix(PREFIX)
    path = builtin_path(name)
    config = builtin_models()[name]["config"]
    known = config["num_heads"] if isinstance(config, dict) else None
    return read_checkpoint(path), Hints(hints.num_heads or known, hints.num_groups)


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
    scores: Importance | None,
    order: UnitOrder,
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
            "tensors": len(read.tensors),
            "dtypes": dtypes_of(read),
        },
        geometry=asdict(model.geometry),
        params={"static": total - routers, "routers": routers, "total": total},
        importance=scores.method if scores is not None else "imported",
        grouping=order.grouping,
        static_gmacs=macs_of(model.geometry).total / 1e9,
        ratio_floor=ratio_floor(model.geometry),
        verification=verification,
    )


def dtypes_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The commonest type of the tensors under ``*``, and the keys that have another: what a static export restores."""
    names = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in checkpoint.tensors.items()}
    common = Counter(names.values()).most_common(1)[0][0]
    return {"*": common} | {key: name for key, name in names.items() if name != common}


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
