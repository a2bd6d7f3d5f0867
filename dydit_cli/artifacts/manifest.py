"""What made an artifact: stage, settings, versions, commit, parent and hashes. Resume and lineage read it, never file names."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts.writing import write_json
from dydit_cli.errors import DyditError
from dydit_cli.plugged import IN_USE

SCHEMA = 1
NAME = "manifest.json"
PACKAGES = ("dydit", "torch", "diffusers", "safetensors", "accelerate", "peft", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """The commit of the checkout that this package runs from, or None outside one.

    An installation inside a project of the user's is not part of that project: git must know this very file.
    """
    file = Path(__file__)
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    return result.stdout.strip()


def device_description(device: torch.device | str) -> str:
    """A device in words: its kind, its name, and on a CPU the number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weight files of an artifact, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    parent: str | Path | None = None,
    results: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write ``manifest.json`` into an artifact and return its content.

    Args:
        folder: The artifact, with its weights written already.
        stage: convert, finetune, profile, sample or export.
        settings: The resolved settings of the stage.
        parent: The artifact or file that the stage read.
        results: What the stage measured.
        device: Where it ran.
    """
    content = {
        "schema": SCHEMA,
        "stage": stage,
        "settings": dict(settings),
        "seed": settings.get("seed"),
        "parent": _parent_entry(parent),
        "results": dict(results or {}),
        "device": device_description(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "plugins": [file.as_dict() for file in IN_USE.values()],
        "commit": source_commit(),
        "weights_sha256": weights_hash(folder)
        if any(folder.glob("diffusion_pytorch_model*.safetensors"))
        else None,
    }
    write_json(folder / NAME, content)
    return content


def _parent_entry(parent: str | Path | None) -> dict[str, Any] | None:
    if parent is None:
        return None
    path = Path(parent)
    entry: dict[str, Any] = {"path": str(parent)}
    if path.is_file():
        entry["sha256"] = file_hash(path)
    elif (path / NAME).exists():
        held = read_manifest(path)
        entry |= {"stage": held.get("stage"), "weights_sha256": held.get("weights_sha256")}
    return entry


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read an artifact's manifest.

    Raises:
        DyditError: If there is none, it is damaged, or it is of a newer schema.
    """
    path = Path(folder) / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DyditError(
            f"{folder} is not an artifact of dydit.",
            why=f"It has no readable {NAME}.",
            fix="Pass the --out folder of an earlier stage.",
        ) from error
    except ValueError as error:
        raise DyditError(
            f"{path} is damaged.", why=f"It is not JSON: {error}.", fix="Run the stage that wrote it again."
        ) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, int):
        raise DyditError(
            f"{path} is not a manifest of dydit.",
            why="It has no schema number; another program's file may bear the same name.",
            fix="Pass the --out folder of an earlier stage.",
        )
    if schema > SCHEMA:
        raise DyditError(
            f"{path} was written by a newer dydit.",
            why=f"Its schema is {schema}; this version reads up to {SCHEMA}.",
            fix="Upgrade dydit.",
        )
    return dict(content)
