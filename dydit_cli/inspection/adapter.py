"""Inspect adapters: files of many trainers, and folders of peft, diffusers and dydit; from their headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dydit_cli.checkpoints.lazy import LazyTensors
from dydit_cli.checkpoints.reading import stored_tensors
from dydit_cli.inspection.keys import dtypes_of
from dydit_cli.inspection.report import Adapter

DYDIT_SETTINGS, PEFT_SETTINGS = "dydit_adapter.json", "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

DOWN = re.compile(
    r"(\.lora_A(\.\w+)?|\.lora_down|\.lora\.down|_lora_down)\.weight$|\.lora_A$|\.(hada_w1_a|lokr_w1)$"
)
KINDS = {
    "lora_magnitude_vector": "dora",
    "dora_scale": "dora",
    "hada_w": "loha",
    "lokr_w": "lokr",
    "oft_": "oft",
}
NAMES = {"lora_unet_": "kohya", "lora_te": "kohya", "base_model.model.": "peft", "transformer.": "diffusers"}


def is_adapter_file(keys: Iterable[str]) -> bool:
    """Whether keys are those of an adapter and not of a model."""
    return any(DOWN.search(key) for key in keys)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is an adapter's."""
    return any((folder / name).is_file() for name in (DYDIT_SETTINGS, PEFT_SETTINGS, *PEFT_WEIGHTS))


def adapters_in(folder: Path) -> tuple[Adapter, ...]:
    """The adapters of a folder: the folder itself, or those directly in it."""
    if is_adapter_folder(folder):
        return (describe_folder(folder),)
    inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_adapter_folder(entry))
    return tuple(describe_folder(entry) for entry in inside)


def describe_file(path: Path) -> Adapter:
    """Describe an adapter file by its keys and shapes.

    Raises:
        DyditError: If it cannot be read.
    """
    tensors = stored_tensors(path)
    return _described(path, tensors, _kind(tensors), _names(tensors), None)


def describe_folder(folder: Path) -> Adapter:
    """Describe an adapter's folder: dydit's own (LoRA or TD-LoRA), peft's or diffusers'.

    Raises:
        DyditError: If its weights cannot be read.
    """
    said = _settings(folder / DYDIT_SETTINGS)
    place = folder / "expert_0" if said.get("kind") == "td-lora" else folder
    file = next((place / name for name in PEFT_WEIGHTS if (place / name).is_file()), None)
    if file is None:
        return Adapter(
            str(folder), str(said.get("kind", "lora")), "dydit", 0, said.get("rank"), said.get("experts"), 0
        )
    tensors = stored_tensors(file)
    kind = str(said.get("kind") or _kind(tensors))
    return _described(folder, tensors, kind, "dydit" if said else _names(tensors), said.get("experts"))


def _described(path: Path, tensors: LazyTensors, kind: str, names: str, experts: int | None) -> Adapter:
    down = [key for key in tensors if DOWN.search(key)]
    ranks = {tensors.spec(key).shape[0] for key in down if tensors.spec(key).shape}
    specs = tensors.specs.values()
    count = sum(spec.numel for spec in specs)
    if experts:
        # A is shared; each expert has a B of its own.
        shared = sum(tensors.spec(key).numel for key in down)
        count = shared + experts * (count - shared)
    return Adapter(
        path=str(path),
        kind=kind,
        names=names,
        layers=len(down),
        rank=ranks.pop() if len(ranks) == 1 else None,
        experts=experts,
        parameters=count,
        dtypes=dtypes_of(specs),
    )


def _kind(keys: Iterable[str]) -> str:
    return next((kind for key in keys for part, kind in KINDS.items() if part in key), "lora")


def _names(keys: Iterable[str]) -> str:
    return next((name for key in keys for start, name in NAMES.items() if key.startswith(start)), "other")


def _settings(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
