"""Checkpoints of a run: everything that the next step needs, as safetensors and JSON, whole or not there at
all.

``checkpoints/step_0000500/`` holds ``model.safetensors``, ``ema.safetensors``, ``optimizer.safetensors`` and
``state.json``. There is no state of a random generator: every draw is a function of the seed and the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dydit_cli.artifacts import artifact_folder, write_json
from dydit_cli.artifacts.leftovers import remove_folder
from dydit_cli.artifacts.writing import flush
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.processes.world import ALONE, World
from dydit_cli.training.average import MovingAverage
from dydit_cli.training.method import changing_state, with_frozen_state
from dydit_cli.training.optimiser import load_state_by_name, state_by_name
from dydit_cli.training.sharding import load_whole, whole_tensors

SCHEMA = 1
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Training:
    """The parts of a run that change from step to step.

    Attributes:
        model: What trains.
        average: Its moving average.
        optimiser: AdamW.
        scaler: The loss scaler of fp16, or None.
        world: The processes of the run: all take part in a checkpoint, and the first writes it.
    """

    model: DynamicModel
    average: MovingAverage
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    world: World = ALONE


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        path: Its folder.
        step: Steps done; read from the checkpoint, not from the folder's name.
        facts: What else the run noted, such as the digest of its data.
    """

    path: Path
    step: int
    facts: Mapping[str, Any]


def write_checkpoint(
    out: Path, step: int, training: Training, *, keep: int, facts: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of ``step`` into the run folder ``out`` and remove all but the ``keep`` newest.

    It holds whole tensors, however many processes share them, so that any number of processes can go on from it.

    Raises:
        DyditError: if the disk refuses; older checkpoints are untouched then.
    """
    path = out / FOLDER / f"step_{step:07d}"
    tensors = {
        "model": changing_state(training.model),
        "ema": changing_state(training.average.model),
        "optimizer": state_by_name(training.optimiser, training.model),
    }
    files = {name: whole_tensors(held, training.world) for name, held in tensors.items()}
    if not training.world.is_first:
        return path
    with artifact_folder(path, overwrite=True) as temporary:
        for name, held in files.items():
            save_file(_contiguous(held), temporary / f"{name}.safetensors")
        scaler = training.scaler.state_dict() if training.scaler is not None else None
        write_json(temporary / "state.json", {"schema": SCHEMA, "step": step, "scaler": scaler, **facts})
        flush(temporary)
    for older in checkpoints(out)[:-keep]:
        remove_folder(older.path)
    return path


def checkpoints(out: Path) -> list[Checkpoint]:
    """The checkpoints of a run folder, by step; one that does not say its step is none."""
    found = []
    for folder in _folders(out):
        try:
            content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            found.append(Checkpoint(folder, int(content["step"]), content))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def nameless(out: Path) -> list[Path]:
    """Folders among the checkpoints that do not say their step: damaged ones."""
    known = {checkpoint.path for checkpoint in checkpoints(out)}
    return [folder for folder in _folders(out) if folder not in known]


def forget_after(out: Path, step: int) -> None:
    """Remove the checkpoints of a run folder that are damaged or lie beyond ``step``, from which it goes on."""
    beyond = [checkpoint.path for checkpoint in checkpoints(out) if checkpoint.step > step]
    for folder in (*nameless(out), *beyond):
        remove_folder(folder)


def _folders(out: Path) -> list[Path]:
    # A temporary folder of a killed process begins with a dot; it is not whole.
    return sorted(path for path in (out / FOLDER).glob("step_*") if path.is_dir())


def read_checkpoint(checkpoint: Checkpoint, training: Training) -> None:
    """Put a checkpoint's numbers into the parts of a run.

    Raises:
        DyditError: if a file is missing or damaged, or is of another model.
    """
    try:
        for model, name in ((training.model, "model"), (training.average.model, "ema")):
            tensors = load_file(checkpoint.path / f"{name}.safetensors")
            load_whole(model, with_frozen_state(model, tensors))
        moments = load_file(checkpoint.path / "optimizer.safetensors")
        load_state_by_name(training.optimiser, training.model, moments)
        if training.scaler is not None and checkpoint.facts.get("scaler"):
            training.scaler.load_state_dict(checkpoint.facts["scaler"])
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise _damaged(checkpoint.path, error) from error


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _damaged(path: Path, error: Exception) -> DyditError:
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return DyditError(
        f"The checkpoint {path} cannot be read.",
        why=f"A file of it is missing, damaged or of another model: {first_line[:200]}.",
        fix="Restore it from a copy, or start again with --overwrite.",
    )
