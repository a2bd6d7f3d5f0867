"""Open `.pt` and `.safetensors` files and folders of shards, all at once or tensor by tensor.

A checkpoint from a stranger is data. `torch.load` runs with ``weights_only=True`` always; the one class beside tensors that is
let through is `argparse.Namespace`, which DiT's and SiT's own training scripts save, and which can do nothing.

Files come as people have them: wrapped by a training script, with prefixes, beside text encoders in an all-in-one file, in fp8.
What `open_checkpoint` gives is the diffusion model's own tensors under their plain names.
"""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.checkpoints.damage import unreadable
from dydit_cli.checkpoints.foreign import refuse_foreign, refuse_gguf
from dydit_cli.checkpoints.fp8 import Dequantised, kind_of
from dydit_cli.checkpoints.layout import Rearranged, Rows
from dydit_cli.checkpoints.lazy import LazyTensors, MemoryTensors
from dydit_cli.checkpoints.names import plain_names
from dydit_cli.checkpoints.stored import read_header, read_index
from dydit_cli.checkpoints.terms import Terms
from dydit_cli.errors import DyditError

# The copies of the weights that training scripts keep, best first: the EMA is the one that was evaluated.
WRAPPERS = ("ema", "model", "module", "state_dict")
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a file or folder.

    Attributes:
        path: Where they come from.
        tensors: Key -> tensor on the CPU, prefixes of wrappers removed; a dictionary, or `LazyTensors`.
        copy: Which copy inside the file was taken (``ema``, ``model``, ...), or "" for a flat file.
        container: ``torch`` or ``safetensors``.
        quantisation: ``fp8`` or ``scaled fp8`` where tensors were stored so and are given as bf16, else "".
        config: The ``config.json`` beside the weights of a folder, which says what tensors cannot.
        left_out: What else the file holds: keys of other models in an all-in-one file, entries beside the copy that was taken.
        terms: Under which licence it was published, where whoever opened it asked.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    copy: str
    container: str
    quantisation: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    terms: Terms = field(default_factory=Terms)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, or a folder that holds one (sharded or not), into memory.

    Raises:
        DyditError: If it is missing, cut short, not a checkpoint, holds code, holds no tensors, or is quantised.
    """
    opened = _open(Path(path), mapped=False)
    return replace(opened, tensors={key: opened.tensors[key] for key in opened.tensors})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint whose tensors are read as they are used; shapes and types are known at once.

    Raises:
        DyditError: If it is missing, cut short, not a checkpoint, holds code, holds no tensors, or is quantised.
    """
    return _open(Path(path), mapped=True)


def _open(path: Path, *, mapped: bool) -> Checkpoint:
    if not path.exists():
        raise DyditError(
            f"There is no checkpoint at {path}.",
            why="Neither a file nor a folder of that name exists.",
            fix="Check the path; relative paths start from the folder in which dydit runs.",
        )
    if path.is_dir():
        return _open_folder(path, mapped=mapped)
    return _finished(path, *_stored(path, mapped=mapped))


def stored_tensors(path: Path) -> LazyTensors:
    """Open one file as it is, under the keys that it has: an adapter, whose prefixes mean something.

    Raises:
        DyditError: If it is cut short, not a checkpoint, holds code or no tensors.
    """
    return _stored(path, mapped=True)[0]


def _stored(path: Path, *, mapped: bool) -> tuple[LazyTensors, str, str, tuple[str, ...]]:
    """(tensors, copy, container, entries beside the copy) of a file."""
    refuse_gguf(path)
    if path.suffix == ".safetensors":
        return read_header(path), "", "safetensors", ()
    if path.suffix in TORCH_SUFFIXES or zipfile.is_zipfile(path):
        content = _read_torch(path, mapped=mapped)
        tensors, copy = _unwrap(content, path)
        beside = (str(key) for key in content if key != copy) if copy else ()
        return MemoryTensors(tensors), copy, "torch", tuple(beside)
    raise DyditError(
        f"{path} is not a kind of checkpoint that dydit reads.",
        why=f"Its name ends in '{path.suffix}', not in .safetensors or one of {', '.join(TORCH_SUFFIXES)}.",
        fix="Bring the .pt or .safetensors file of the model.",
    )


def _finished(
    path: Path, stored: LazyTensors, copy: str, container: str, beside: tuple[str, ...] = ()
) -> Checkpoint:
    """The diffusion model's tensors under plain names, dequantised where they were fp8."""
    if not stored:
        raise _no_weights(path, "It is whole, but names no tensor.")
    names = plain_names(stored)
    tensors: LazyTensors = Rearranged(stored, {name: (Rows(key),) for name, key in names.items()})
    refuse_foreign(tensors, path)
    quantisation = kind_of(tensors)
    if quantisation:
        tensors = Dequantised(tensors)
    taken = set(names.values())
    left_out = (*beside, *(key for key in stored if key not in taken))
    return Checkpoint(path, tensors, copy, container, quantisation, left_out=left_out)


def _open_folder(folder: Path, *, mapped: bool) -> Checkpoint:
    config = _config_of(folder)
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    named = [index for index in indices if index.name.removesuffix(INDEX_SUFFIX) in WEIGHT_NAMES]
    if len(named or indices) == 1:
        index = (named or indices)[0]
        return replace(_finished(folder, read_index(index), "", "safetensors"), config=config)
    candidates = sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix == ".safetensors" or entry.suffix in TORCH_SUFFIXES
    )
    chosen = [entry for entry in candidates if entry.stem in WEIGHT_NAMES] or candidates
    # diffusers' older repositories keep the same weights in both forms.
    safe = [entry for entry in chosen if entry.suffix == ".safetensors"]
    if safe and len({entry.stem for entry in chosen}) == 1:
        chosen = safe
    if len(chosen) == 1:
        return replace(_open(chosen[0], mapped=mapped), config=config)
    if not chosen and (folder / "transformer").is_dir():
        # A pipeline's folder: the model stands in a folder of its own beside the VAE and the text encoders.
        return _open_folder(folder / "transformer", mapped=mapped)
    found = ", ".join(entry.name for entry in chosen) if chosen else "none"
    raise DyditError(
        f"The folder {folder} does not hold one checkpoint.",
        why=f"Weight files found in it: {found}.",
        fix="Pass the file itself.",
    )


def _config_of(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``, or nothing where it has none: tensors tell almost everything."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_torch(path: Path, *, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch asks for an issue to be filed about pickles of another age; what cannot be read is explained below.
            warnings.simplefilter("ignore", UserWarning)
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path)
            )
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
        raise unreadable(path, error) from error
    except Exception as error:
        # A damaged pickle makes the reader stumble over anything: an empty stack, a missing storage, a wrong type.
        raise unreadable(path, error) from error


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


def _no_weights(path: Path, why: str) -> DyditError:
    return DyditError(f"{path} holds no weights.", why=why, fix="Save the model's state dict into it.")


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in mapping.items() if isinstance(value, Tensor)}
