"""Inspect what a stage wrote: a dynamic model, a pipeline, or results; and foreign pipelines, whose model is inspected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dydit_cli.artifacts.ancestry import ancestors, manifest_of, words_of
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.artifacts.manifest import NAME
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.conversion.insertion import is_ours
from dydit_cli.errors import DyditError
from dydit_cli.families.registry import class_named, family_named
from dydit_cli.inspection.adapter import adapters_in
from dydit_cli.inspection.checkpoint import model_of, stored_of
from dydit_cli.inspection.keys import grouped
from dydit_cli.inspection.report import Inspection, Keys, Routers
from dydit_cli.shell import quoted

FACTS = ("ratio", "target_ratio", "steps", "held_out_loss", "total_ratio", "trajectory_ratio", "static_gmacs")
SETTINGS = ("target_ratio", "data", "method", "format", "importance", "grouping", "seed")


def our_class(folder: Path) -> str | None:
    """The name of the dynamic model's class in a folder (or in its ``transformer/``), or None where it holds none."""
    for place in (folder, folder / "transformer"):
        try:
            name = str(json.loads((place / "config.json").read_text(encoding="utf-8")).get("_class_name"))
        except (OSError, ValueError, AttributeError):
            continue
        if class_named(name) is not None:
            return name
    return None


def inspect_artifact(folder: Path) -> Inspection:
    """Inspect a folder with a dynamic model, with or without a manifest.

    Raises:
        DyditError: If its weights cannot be opened.
    """
    manifest = manifest_of(folder) or {}
    place = model_folder(folder)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    stored_class = class_named(str(config["_class_name"]))
    if stored_class is None:
        raise TypeError(config["_class_name"])
    family = family_named(stored_class.family)
    arguments = {key: value for key, value in config.items() if not key.startswith("_") and key != "auto_map"}
    found = Inspection(
        path=str(folder),
        kind="pipeline" if place != folder else "artifact",
        stage=manifest.get("stage"),
        families=(family.name,),
        layout="dydit",
        config=config,
        adapters=adapters_in(folder),
        facts=facts_of(manifest),
        lineage=tuple(ancestors(manifest)),
    )
    try:
        checkpoint = open_checkpoint(place)
        model = model_of(family, arguments)
    except (DyditError, TypeError, ValueError, KeyError) as error:
        return replace(found, problem=_problem(error, place))
    specs = lazily(checkpoint.tensors).specs
    expected = model.state_dict()
    routers = sum(spec.numel for key, spec in specs.items() if "_router." in key)
    static = sum(
        spec.numel for key, spec in specs.items() if not (is_ours(key) or key.startswith("baked_widths."))
    )
    unknown = [key for key in specs if key not in expected]
    missing = [key for key in expected if key not in specs]
    found = replace(
        found,
        stored=stored_of(checkpoint),
        geometry=asdict(model.geometry),
        parameters={"static": static, "routers": routers, "total": static + routers},
        routers=_routers(config, routers),
        keys=Keys(
            len(specs),
            len(specs) - len(unknown),
            lost=grouped(unknown, "not known to the model"),
            missing=grouped(missing, "needed and not there"),
        ),
    )
    return replace(found, next=_next_command(found))


def inspect_results(folder: Path) -> Inspection:
    """Inspect a folder that has a manifest and no model: samples, a profile, a cache."""
    manifest = manifest_of(folder) or {}
    stage = str(manifest.get("stage"))
    return Inspection(
        path=str(folder),
        kind="results",
        stage=stage,
        facts=facts_of(manifest),
        lineage=tuple(ancestors(manifest)),
        next=_after_results(stage, folder, manifest),
    )


def inspect_unfinished(folder: Path) -> Inspection:
    """Inspect a fine-tuning that has checkpoints and no final weights yet."""
    steps = sorted(entry.name for entry in (folder / "checkpoints").iterdir() if entry.is_dir())
    recipe = folder / "recipe.yaml"
    resume = f"dydit finetune {quoted(recipe)} --resume" if recipe.exists() else None
    return Inspection(
        path=str(folder),
        kind="unfinished run",
        stage="finetune",
        facts={"checkpoints": steps},
        notes=("It has checkpoints, but no final weights yet.",),
        next=resume,
    )


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says came of a stage, and how it was set."""
    settings, results = manifest.get("settings") or {}, manifest.get("results") or {}
    found = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    if words := words_of(manifest):
        found["did"] = words
    found |= {name: results[name] for name in FACTS if isinstance(results.get(name), int | float)}
    if manifest.get("weights_sha256"):
        found["weights_sha256"] = manifest["weights_sha256"]
    return found | {name: manifest[name] for name in ("versions", "commit", "device") if manifest.get(name)}


def has_manifest(folder: Path) -> bool:
    """Whether a folder is an artifact of a stage."""
    return (folder / NAME).is_file()


def _routers(config: Mapping[str, Any], parameters: int) -> Routers | None:
    """What a configuration says of routers; None of a pruned model, which has none."""
    if not parameters:
        return None
    return Routers(
        "dydit",
        parameters,
        width=str(config.get("width", "free")),
        always_on=bool(config.get("always_on", True)),
        budgets=tuple(config["budgets"]) if config.get("budgets") else None,
        baked_steps=(config.get("baked") or {}).get("steps"),
    )


def _problem(error: Exception, place: Path) -> dict[str, str]:
    if isinstance(error, DyditError):
        return {"what": error.what, "why": error.why, "fix": error.fix}
    return {
        "what": f"{place / 'config.json'} does not fit the model that it names.",
        "why": str(error),
        "fix": "It may be of a newer dydit: upgrade, or run the stage that wrote it again.",
    }


def _next_command(found: Inspection) -> str | None:
    model = quoted(found.path)
    missing = family_named(found.families[0]).missing
    if found.routers is not None and found.routers.baked_steps is not None:
        return f"dydit sample --model {model} --steps {found.routers.baked_steps} --out runs/samples"
    if found.kind == "pipeline":
        return f"dydit profile --model {model}"
    if found.stage == "convert" and "ratio" not in found.facts:
        if "dydit finetune" in missing:
            return f"dydit profile --model {model}"
        return f"dydit finetune --model {model} --data DATA --target-ratio 0.5 --steps STEPS --out runs/finetuned"
    return f"dydit profile --model {model} --report report.html"


def _after_results(stage: str, folder: Path, manifest: Mapping[str, Any]) -> str | None:
    parent = (manifest.get("parent") or {}).get("path")
    if stage in ("profile", "evaluate"):
        return f"dydit compare {quoted(folder)}"
    if stage == "prepare":
        return f"dydit finetune --model MODEL --data {quoted(folder)} --steps STEPS --out runs/finetuned"
    if stage == "sample" and parent:
        return f"dydit evaluate {quoted(folder)}"
    return None
