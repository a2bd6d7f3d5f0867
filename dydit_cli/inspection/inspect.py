"""Tell what a path is, and inspect it as that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from dydit_cli.checkpoints.reading import TORCH_SUFFIXES
from dydit_cli.checkpoints.stored import read_header
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Hints
from dydit_cli.inspection.adapter import adapters_in, describe_file, is_adapter_file, is_adapter_folder
from dydit_cli.inspection.artifact import (
    has_manifest,
    inspect_artifact,
    inspect_results,
    inspect_unfinished,
    our_class,
)
from dydit_cli.inspection.checkpoint import inspect_checkpoint, weight_files
from dydit_cli.inspection.report import Inspection, Stored
from dydit_cli.shell import quoted

SCORES = "importance.safetensors"


def inspect(
    path: Path, hints: Hints | None = None, named: str | None = None, family: str | None = None
) -> Inspection:
    """Say what a file or a folder is, from headers, configurations and manifests.

    Args:
        path: A checkpoint, an adapter, an artifact, a pipeline's folder, or results.
        hints: What a checkpoint's file cannot say.
        named: What the user calls it, if that is not its path.
        family: Its family, where that is known otherwise.

    Raises:
        DyditError: If nothing is there, or it cannot be read.
    """
    if not path.exists():
        raise DyditError(
            f"There is nothing at {path}.",
            why="Neither a file nor a folder of that name exists.",
            fix="Check the path; relative paths start from the folder in which dydit runs.",
        )
    if path.is_file():
        return _file(path, hints, named, family)
    if our_class(path) is not None:
        return inspect_artifact(path)
    if has_manifest(path):
        return inspect_results(path)
    if is_adapter_folder(path):
        return _adapter(path, inspect_folder=True)
    if (path / "checkpoints").is_dir():
        return inspect_unfinished(path)
    found = inspect_checkpoint(path, hints, named, family)
    return _with_pipeline(found, path)


def _file(path: Path, hints: Hints | None, named: str | None, family: str | None) -> Inspection:
    if path.name == SCORES:
        return Inspection(
            path=str(path),
            kind="scores",
            notes=("Importance scores of a conversion.",),
            next=f"dydit convert --checkpoint CHECKPOINT --importance {quoted(path)} --out runs/converted",
        )
    if path.suffix == ".safetensors" and is_adapter_file(read_header(path)):
        return _adapter(path, inspect_folder=False)
    if (path.suffix == ".safetensors" or path.suffix in TORCH_SUFFIXES) and _is_ours(path):
        return inspect_artifact(path.parent)
    return inspect_checkpoint(path, hints, named, family)


def _is_ours(path: Path) -> bool:
    """Whether a weight file lies in the folder of a dynamic model, and is its only one."""
    return our_class(path.parent) is not None and path in weight_files(path.parent)


def _adapter(path: Path, *, inspect_folder: bool) -> Inspection:
    adapters = adapters_in(path) if inspect_folder else (describe_file(path),)
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    stored = Stored(
        container="safetensors",
        files=len(files),
        nbytes=sum(file.stat().st_size for file in files),
        dtypes=adapters[0].dtypes,
    )
    ours = adapters[0].names == "dydit"
    adapter = quoted(path)
    return Inspection(
        path=str(path),
        kind="adapter",
        stored=stored,
        adapters=adapters,
        next=None
        if ours
        else f"dydit convert --checkpoint CHECKPOINT --lora {adapter}:1.0 --out runs/converted",
    )


def _with_pipeline(found: Inspection, folder: Path) -> Inspection:
    """Say which pipeline a checkpoint's folder belongs to, if it is one's."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
        note = f"A folder of diffusers' {index['_class_name']}: {', '.join(parts)}. dydit converts its transformer."
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return found
    return replace(found, kind="pipeline", notes=(*found.notes, note))
