"""Read `.pt` and `.safetensors` files and folders of shards into a flat dictionary of tensors.

A checkpoint from a stranger is data. `torch.load` runs with ``weights_only=True`` always; the one class beside tensors that is
let through is `argparse.Namespace`, which DiT's and SiT's own training scripts save, and which can do nothing.
"""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dydit_cli.errors import DyditError

# The copies of the weights that training scripts keep, best first: the EMA is the one that was evaluated.
WRAPPERS = ("ema", "model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.")
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors read from a file or folder.

    Attributes:
        path: Where they came from.
        tensors: Key -> tensor on the CPU, prefixes of wrappers removed.
        copy: Which copy inside the file was taken (``ema``, ``model``, ...), or "" for a flat file.
        container: ``torch`` or ``safetensors``.
    """

    path: Path
    tensors: dict[str, Tensor]
    copy: str
    container: str


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, or a folder that holds one (sharded or not).

    Raises:
        DyditError: If it is missing, cut short, not a checkpoint, holds code, or holds no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise DyditError(
            f"There is no checkpoint at {path}.",
            why="Neither a file nor a folder of that name exists.",
            fix="Check the path; relative paths start from the folder in which dydit runs.",
        )
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return Checkpoint(path, _flat(_read_safetensors(path), path), "", "safetensors")
    if path.suffix in TORCH_SUFFIXES or zipfile.is_zipfile(path):
        tensors, copy = _unwrap(_read_torch(path), path)
        return Checkpoint(path, _strip_prefixes(tensors), copy, "torch")
    raise DyditError(
        f"{path} is not a kind of checkpoint that dydit reads.",
        why=f"Its name ends in '{path.suffix}', not in .safetensors or one of {', '.join(TORCH_SUFFIXES)}.",
        fix="Bring the .pt or .safetensors file of the model.",
    )


def _read_folder(folder: Path) -> Checkpoint:
    for name in WEIGHT_NAMES:
        index = folder / f"{name}.safetensors.index.json"
        if index.exists():
            return Checkpoint(folder, _flat(_read_shards(index), index), "", "safetensors")
    candidates = sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix == ".safetensors" or entry.suffix in TORCH_SUFFIXES
    )
    named = [entry for entry in candidates if entry.stem in WEIGHT_NAMES]
    chosen = named or candidates
    if len(chosen) == 1:
        return read_checkpoint(chosen[0])
    found = ", ".join(entry.name for entry in chosen) if chosen else "none"
    raise DyditError(
        f"The folder {folder} does not hold one checkpoint.",
        why=f"Weight files found in it: {found}.",
        fix="Pass the file itself.",
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DyditError(
            f"{index} is not a shard index.",
            why=f"It has no readable 'weight_map' ({type(error).__name__}).",
            fix="Copy the folder again from its source.",
        ) from error
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        file = index.parent / Path(str(shard)).name
        if not file.exists():
            raise DyditError(
                f"The shard {file} is missing.",
                why=f"{index.name} names {len(shards)} shards: {', '.join(map(str, shards))}.",
                fix="Copy the missing file beside the others.",
            )
        tensors |= _read_safetensors(file)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch asks for an issue to be filed about pickles of another age; what cannot be read is explained below.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (
            "Unsupported global" in str(error)
            or "Unsupported operand" in str(error)
            or "GLOBAL" in str(error)
        ):
            raise DyditError(
                f"{path} holds more than weights, and was not loaded.",
                why=f"Loading it would run code: {_first_global(str(error))}. Checkpoints are treated as data.",
                fix="Ask for a .safetensors file, or save its state dict alone with torch.save where you trust it.",
            ) from error
        raise _unreadable(path, error) from error
    except Exception as error:
        # A damaged pickle makes the reader stumble over anything: an empty stack, a missing storage, a wrong type.
        raise _unreadable(path, error) from error


def _first_global(message: str) -> str:
    """The name of the offending object in torch's message."""
    for line in message.splitlines():
        if "GLOBAL" in line or "Unsupported global" in line:
            words = [
                word for word in line.replace("`", " ").split() if "." in word and not word.endswith(".")
            ]
            if words:
                return f"it names {words[0]}"
    return "it names objects that are not tensors"


def _unreadable(path: Path, error: Exception) -> DyditError:
    size = path.stat().st_size if path.exists() else 0
    # torch adds advice of several sentences, for files of its own only.
    said = str(error).splitlines()[0].split(". ")[0][:160].rstrip(".") if str(error) else type(error).__name__
    return DyditError(
        f"{path} cannot be read as a checkpoint.",
        why=f"The file is cut short or damaged, or not a checkpoint: {size:,} bytes, {said}.",
        fix="Compare its size with the source's and copy or download it again.",
    )


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """Take the best copy of the weights out of what a training script saved."""
    if isinstance(content, Mapping):
        for name in WRAPPERS:
            inner = content.get(name)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                return _tensors(inner), name
        tensors = _tensors(content)
        if tensors:
            return tensors, ""
    keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
    raise _no_weights(
        path, f"A state dict, flat or under one of {', '.join(WRAPPERS)}, was expected; found: {keys}."
    )


def _flat(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a flat file without prefixes."""
    if not tensors:
        raise _no_weights(path, "It is whole, but names no tensor.")
    return _strip_prefixes(tensors)


def _no_weights(path: Path, why: str) -> DyditError:
    return DyditError(f"{path} holds no weights.", why=why, fix="Save the model's state dict into it.")


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in mapping.items() if isinstance(value, Tensor)}


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DDP, torch.compile and others put in front of every key."""
    changed = True
    while changed and tensors:
        changed = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
                changed = True
    return tensors
