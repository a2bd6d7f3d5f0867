"""What was measured of a model, as tables for its card: from the folders of `dydit profile` and `dydit evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dydit_cli.artifacts.ancestry import manifest_of
from dydit_cli.errors import DyditError

PROFILE, EVALUATION = "profile.json", "evaluation.json"

METRICS = {
    "frechet": "Fréchet distance",
    "spatial_frechet": "sFID",
    "kernel": "KID",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
    "temporal_frechet": "Fréchet distance of videos",
}

PAIRS = {
    "psnr": "PSNR against the static model",
    "ssim": "SSIM against the static model",
    "lpips": "LPIPS against the static model",
}


def measured_section(folders: Sequence[str], weights: str) -> str:
    """A section of a card with one table a measurement.

    Args:
        folders: Of `dydit profile` and `dydit evaluate`, or folders that hold such.
        weights: Hash of the weights of the model that is exported.

    Raises:
        DyditError: If a folder holds neither, or what was measured is another model.
    """
    parts = []
    for name in folders:
        for file in _files(Path(name).expanduser()):
            content = _read(file)
            _check_weights(file, content, weights)
            parts.append(_profile(content) if file.name == PROFILE else _evaluation(content))
    return "\n## Measured\n\n" + "\n\n".join(parts) + "\n" if parts else ""


def _files(folder: Path) -> list[Path]:
    found = [folder / name for name in (PROFILE, EVALUATION) if (folder / name).is_file()]
    found = found or sorted(
        file for name in (PROFILE, EVALUATION) for file in folder.glob(f"*/{name}") if folder.is_dir()
    )
    if not found:
        raise DyditError(
            f"Nothing was measured in {folder}.",
            why=f"It holds no {PROFILE} and no {EVALUATION}."
            if folder.exists()
            else "No such folder exists.",
            fix="Pass the --out folder of `dydit profile` or `dydit evaluate`, or leave --measured out.",
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DyditError(
            f"{file} cannot be read.", why=f"{error}.", fix="Run the command that wrote it again."
        ) from error
    return content if isinstance(content, dict) else {}


def _check_weights(file: Path, content: Mapping[str, Any], weights: str) -> None:
    """Another model's numbers do not belong on a card.

    Raises:
        DyditError: If it is known on which weights they were measured, and these are others.
    """
    if file.name == EVALUATION:
        theirs = (content.get("subject") or {}).get("weights_sha256")
    else:
        theirs = ((manifest_of(file.parent) or {}).get("parent") or {}).get("weights_sha256")
    if theirs is not None and theirs != weights:
        raise DyditError(
            f"{file} is of another model.",
            why=f"It was measured on weights with the hash {theirs[:12]}, and those of this model have {weights[:12]}.",
            fix="Measure this model, or export the one that was measured.",
        )


def _profile(content: Mapping[str, Any]) -> str:
    rows = [
        ("attention and MLP MACs", f"{content['ratio']:.3f} of the static model's"),
        (
            "all MACs of a forward pass",
            f"{_number(content['gmacs'])} GMACs, {content['total_ratio']:.3f} of the static model's {_number(content['static_gmacs'])}",
        ),
    ]
    if content.get("trajectory_ratio") is not None:
        rows.append(("the ratio while sampling", f"{content['trajectory_ratio']:.3f}"))
    timed, how = content.get("latency"), ""
    if timed:
        low, high = timed["interval"]
        rows.append(
            (
                "time of a forward pass",
                f"{timed['ratio']:.3f} of the static model's (95 % interval {low:.3f} to {high:.3f}): "
                f"{timed['compact_ms']:.3g} ms against {timed['static_ms']:.3g} ms",
            )
        )
        rounds, batch = timed["repetitions"], timed["batch"]
        how = f"\n\nTimes are medians of {rounds} rounds of batches of {batch} on {timed['device']}, {timed['dtype']}."
    seen = (content.get("inputs") or {}).get("note")
    return _table("`dydit profile`", rows) + how + (f" {seen}" if seen else "")


def _evaluation(content: Mapping[str, Any]) -> str:
    rows = [
        (METRICS.get(name, name.replace("_", " ")), _interval(measure))
        for name, measure in (content.get("metrics") or {}).items()
        if measure and measure.get("value") is not None
    ]
    pairs = content.get("pairs") or {}
    for name, summary in (pairs.get("measures") or {}).items():
        if (summary.get("mean") or {}).get("value") is not None:
            rows.append((PAIRS.get(name, f"{name} against the static model"), _interval(summary["mean"])))
    cost = content.get("cost") or {}
    if (cost.get("ratio") or {}).get("value") is not None:
        rows.append(("the ratio while sampling", f"{cost['ratio']['value']:.3f}"))
    subject, network = content.get("subject") or {}, content.get("extractor") or {}
    said = [f"{content.get('images')} images"]
    said += [
        f"{subject[key]} {words}"
        for key, words in (("sampler", "sampler"), ("steps", "steps"))
        if subject.get(key)
    ]
    said += [f"guidance {subject['guidance']:g}"] if subject.get("guidance") else []
    said += [f"features of {network['name']}"] if network.get("name") else []
    return _table("`dydit evaluate`", rows) + f"\n\nOf {', '.join(said)}; intervals are of 95 %."


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join([f"| {title} | |", "| --- | --- |", *(f"| {name} | {words} |" for name, words in rows)])


def _interval(measure: Mapping[str, Any]) -> str:
    value, low, high = measure["value"], measure.get("low"), measure.get("high")
    return f"{value:.4g}" + (f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
