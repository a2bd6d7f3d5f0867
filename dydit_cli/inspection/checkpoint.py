"""Inspect a checkpoint of others: as which family it is read, and what of it would be kept."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dydit_cli.checkpoints import Checkpoint, open_checkpoint
from dydit_cli.checkpoints.lazy import TensorSpec, lazily
from dydit_cli.conversion.convert import candidate_families
from dydit_cli.conversion.insertion import is_ours
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family, Hints, Source
from dydit_cli.inspection.keys import Witnessed, dtypes_of, grouped
from dydit_cli.inspection.report import Inspection, Keys, Routers, Stored
from dydit_cli.shell import quoted

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
TABLES = ("pos_embed", "temp_pos_embed", "y_embedding")


def inspect_checkpoint(
    path: Path, hints: Hints | None = None, named: str | None = None, family: str | None = None
) -> Inspection:
    """Inspect a checkpoint file or folder; its numbers are not read (a `.pt` is mapped into memory).

    Args:
        path: The file or folder.
        hints: What the file cannot say.
        named: What the user calls it, if that is not its path (``builtin:dit_fmnist``).
        family: Its family, where that is known otherwise.

    Raises:
        DyditError: If it cannot be opened as a checkpoint at all.
    """
    checkpoint = open_checkpoint(path)
    name = named or str(path)
    found = Inspection(path=name, kind="checkpoint", stored=stored_of(checkpoint))
    candidates = candidate_families(checkpoint)
    candidates = [each for each in candidates if each.name == family] or candidates
    if not candidates:
        first = ", ".join(list(checkpoint.tensors)[:3])
        return replace(
            found,
            keys=Keys(
                len(checkpoint.tensors), 0, lost=grouped(checkpoint.tensors, "of no family known here")
            ),
            problem={
                "what": "It is a checkpoint, and of none of the families that dydit knows.",
                "why": f"Its keys begin with {first}.",
                "fix": "Bring the weights of the diffusion transformer itself, in its original layout or diffusers'.",
            },
        )
    found = replace(
        found,
        families=tuple(family.name for family in candidates),
        layout=candidates[0].layout(checkpoint.tensors),
        config=dict(checkpoint.config),
    )
    try:
        return _read(found, checkpoint, candidates[0], hints or Hints())
    except DyditError as error:
        return replace(found, problem={"what": error.what, "why": error.why, "fix": error.fix})


def stored_of(checkpoint: Checkpoint) -> Stored:
    """How a checkpoint lies on disk."""
    path = checkpoint.path
    files = [path] if path.is_file() else weight_files(path)
    return Stored(
        container=checkpoint.container,
        files=len(files),
        nbytes=sum(file.stat().st_size for file in files),
        copy=checkpoint.copy,
        beside=grouped(checkpoint.left_out, "other copies, or parts of other models"),
        dtypes=dtypes_of(
            spec for key, spec in lazily(checkpoint.tensors).specs.items() if not key.endswith("_order")
        ),
        quantisation=checkpoint.quantisation,
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, or of ``transformer/`` in it: safetensors, or others where there are none."""
    for place in (folder, folder / "transformer"):
        if place.is_dir():
            files = sorted(entry for entry in place.iterdir() if entry.suffix in WEIGHTS)
            safe = [file for file in files if file.suffix == ".safetensors"]
            if files:
                return safe or files
    return []


def model_of(family: Family, config: dict[str, Any]) -> DynamicModel:
    """The model of a configuration, with shapes and no numbers."""
    with torch.device("meta"):
        return family.model_class(**config)


def _read(found: Inspection, checkpoint: Checkpoint, family: Family, hints: Hints) -> Inspection:
    witnessed = Witnessed(lazily(checkpoint.tensors))
    given = replace(hints, config=hints.config or checkpoint.config)
    source = family.read(witnessed, given)
    model = model_of(family, dict(source.config))
    # What reading touched to find the geometry is used in any case; making each tensor shows the rest.
    tensors = {key: source.tensors[key] for key in source.tensors}
    specs = {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    static = sum(spec.numel for key, spec in specs.items() if not is_ours(key))
    notes = [note for note in (_shapes(model, specs), _epsilon(source)) if note]
    return replace(
        found,
        geometry=asdict(model.geometry),
        config=dict(source.config),
        parameters={"static": static, "routers": routers, "total": static + routers},
        routers=_routers(source, routers) if source.dynamic else None,
        keys=_keys(witnessed, model, source, specs),
        notes=tuple(notes),
        next=_next_command(found, source),
    )


def _keys(witnessed: Witnessed, model: DynamicModel, source: Source, specs: dict[str, TensorSpec]) -> Keys:
    expected = model.state_dict()
    unknown = [key for key in specs if key not in expected]
    unused = [key for key in witnessed if key not in witnessed.used]
    missing = [key for key in expected if key not in specs and (source.dynamic or not is_ours(key))]
    missing = [key for key in missing if not key.endswith("_order")]
    tables = [key for key in unused if key.rsplit(".", 1)[-1] in TABLES]
    others = [key for key in unused if key not in tables]
    return Keys(
        total=len(witnessed),
        recognised=len(witnessed) - len(unused) - len(unknown),
        lost=(
            *grouped(unknown, "not known to the family"),
            *grouped(tables, "a table that follows from the geometry"),
            *grouped(others, "not used"),
        ),
        missing=grouped(missing, "needed and not in the file"),
    )


def _routers(source: Source, parameters: int) -> Routers:
    return Routers("authors", parameters, always_on=bool(source.config.get("always_on", True)))


def _shapes(model: DynamicModel, specs: dict[str, TensorSpec]) -> str | None:
    expected = model.state_dict()
    wrong = [
        f"{key} is {spec.shape}, not {tuple(expected[key].shape)}"
        for key, spec in specs.items()
        if key in expected and tuple(expected[key].shape) != spec.shape
    ]
    return f"{len(wrong)} tensors are of another shape than the rest implies: {wrong[0]}" if wrong else None


def _epsilon(source: Source) -> str | None:
    if source.config.get("frequency_shift"):
        return "diffusers' DiT: its timestep frequencies and epsilon differ from the original's and are kept."
    return None


def _next_command(found: Inspection, source: Source) -> str:
    family = f" --family {found.families[0]}" if len(found.families) == 1 else " --family FAMILY"
    return f"dydit convert --checkpoint {quoted(found.path)}{family} --out runs/converted"
