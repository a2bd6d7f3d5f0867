"""Find the evaluations and profiles in folders, and bring together what belongs to the same weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dydit_cli.artifacts.manifest import NAME as MANIFEST
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.metrics.measure import Measure
from dydit_cli.evaluation.report import FILE, SCHEMA
from dydit_cli.evaluation.scoring import METRICS

PROFILE = "profile.json"
STATIC = "static"

IMAGES, RATIO, MMACS, PARAMETERS, SECONDS, TIME_RATIO = (
    "images",
    "ratio",
    "mmacs",
    "parameters",
    "seconds_per_image",
    "time_ratio",
)


@dataclass(frozen=True)
class Run:
    """A line of a comparison.

    Attributes:
        name: The folder, as short as it can be told apart.
        sampling: Sampler, steps and guidance in words; empty where not known.
        values: By metric or cost, each with its interval where it has one.
        network: Name and hash of the feature network.
        reference: Path of what distances are to.
    """

    name: str
    sampling: str
    values: dict[str, Measure] = field(default_factory=dict)
    network: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs, and why some of their numbers cannot be compared."""

    runs: list[Run]
    warnings: list[str]


def gather(paths: Sequence[str | Path]) -> Comparison:
    """Read the runs at ``paths``: folders of `dydit evaluate` or `dydit profile`, or folders that hold such.

    A profile is joined to the evaluations of the same weights.

    Raises:
        DyditError: If a path holds neither, or a file is damaged.
    """
    evaluations: list[Path] = []
    profiles: list[Path] = []
    for path in map(Path, paths):
        own, theirs = _files(path, FILE), _files(path, PROFILE)
        if not own and not theirs:
            raise DyditError(
                f"There is nothing to compare at {path}.",
                why=f"Neither it nor a folder in it has a {FILE} or a {PROFILE}."
                if path.exists()
                else "No such file or folder exists.",
                fix="Run `dydit evaluate MODEL --out FOLDER` first, and pass that folder.",
            )
        evaluations += own
        profiles += theirs
    read = {file: _read(file) for file in dict.fromkeys([*evaluations, *profiles])}
    hashes = {file: _weights(file) for file in dict.fromkeys(profiles)}
    names = _names([*dict.fromkeys(evaluations), *hashes])
    runs, used = [], set()
    for file in dict.fromkeys(evaluations):
        weights = read[file].get("subject", {}).get("weights_sha256")
        fitting = [profile for profile, found in hashes.items() if found is not None and found == weights]
        used.update(fitting)
        runs.append(_run(names[file], read[file], read[fitting[0]] if fitting else None))
    for file in hashes:
        if file not in used:
            runs.append(Run(names[file], "", _profiled(read[file], complete=False)))
    return Comparison(runs, _warnings(runs))


def _files(path: Path, name: str) -> list[Path]:
    if path.is_file():
        return [path] if path.name == name else []
    return [path / name] if (path / name).is_file() else sorted(path.glob(f"*/{name}"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise DyditError(
            f"{file} cannot be read.", why=f"{error}.", fix="Run the command that wrote it again."
        ) from error
    if file.name == FILE and content.get("schema") != SCHEMA:
        raise DyditError(
            f"{file} is not an evaluation that this dydit reads.",
            why=f"Its schema is {content.get('schema')}; this version reads {SCHEMA}.",
            fix="Run `dydit evaluate` again, or use the version that wrote it.",
        )
    return content


def _weights(profile: Path) -> str | None:
    """The hash of the weights that a profile belongs to."""
    try:
        parent = json.loads((profile.parent / MANIFEST).read_text(encoding="utf-8")).get("parent") or {}
        found = parent.get("weights_sha256")
        return None if found is None else str(found)
    except (OSError, ValueError, AttributeError):
        return None


def _run(name: str, evaluation: dict[str, Any], profile: dict[str, Any] | None) -> Run:
    values = {IMAGES: Measure(float(evaluation["images"]))}
    found = evaluation.get("metrics") or {}
    values |= {metric: _measure(found[metric]) for metric in METRICS if metric in found}
    for measure, summary in ((evaluation.get("pairs") or {}).get("measures") or {}).items():
        values[measure] = _measure(summary["mean"])
    made = evaluation["subject"].get("made_by") or {}
    if cost := evaluation.get("cost"):
        values[RATIO] = _measure(cost["ratio"])
        values[MMACS] = Measure(cost["mmacs"])
        values[PARAMETERS] = Measure(float(cost["parameters"]))
        if cost.get("seconds_per_image"):
            values[SECONDS] = _measure(cost["seconds_per_image"])
    if profile is not None:
        values = _profiled(profile, complete=made.get("execution") == STATIC) | values
    network = evaluation.get("extractor") or {}
    return Run(
        name,
        _sampling(made),
        values,
        f"{network['name']} {network['sha256'][:12]}" if network else None,
        (evaluation.get("reference") or {}).get("path"),
    )


def _profiled(profile: dict[str, Any], complete: bool) -> dict[str, Measure]:
    """What a profile says of the model, or of its complete form."""
    values = {
        PARAMETERS: Measure(float(profile["params"]["static" if complete else "total"])),
        MMACS: Measure(1000 * profile["static_gmacs" if complete else "gmacs"]),
        RATIO: Measure(1.0 if complete else profile["ratio"]),
    }
    latency = profile.get("latency")
    if latency and not complete:
        low, high = latency["interval"]
        values[TIME_RATIO] = Measure(latency["ratio"], low, high, "bootstrap")
    if latency and complete:
        values[TIME_RATIO] = Measure(1.0)
    return values


def _measure(content: dict[str, Any]) -> Measure:
    return Measure(content["value"], content.get("low"), content.get("high"), content.get("method"))


def _sampling(made: dict[str, Any]) -> str:
    if not made:
        return ""
    steps = "" if made.get("steps") is None else f" {made['steps']}"
    guidance = "" if made.get("guidance") is None else f", guidance {made['guidance']:g}"
    return f"{made.get('sampler') or ''}{steps}{guidance}"


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """Folders' names; with the folder above where two would be alike."""
    folders = {file: Path(file).resolve().parent for file in files}
    names = {file: folder.name for file, folder in folders.items()}
    alike = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {
        file: f"{folders[file].parent.name}/{name}" if name in alike else name for file, name in names.items()
    }


def _warnings(runs: Sequence[Run]) -> list[str]:
    scored = [run for run in runs if run.network is not None]
    found = []
    for what, values in (
        ("feature networks", {run.network for run in scored}),
        ("references", {run.reference for run in scored if run.reference is not None}),
    ):
        if len(values) > 1:
            found.append(
                f"these runs have different {what} ({', '.join(sorted(map(str, values)))}): "
                "their distances cannot be compared."
            )
    counts = {int(run.values[IMAGES].value) for run in scored}
    if len(counts) > 1:
        found.append(
            f"these runs have {', '.join(map(str, sorted(counts)))} images: the fewer, the larger a Fréchet distance comes out."
        )
    samplings = {run.sampling for run in scored if run.sampling}
    if len(samplings) > 1:
        found.append("these runs were sampled differently; see the column 'sampling'.")
    return found
