"""Checkpoints of a run: everything that the next step needs, as safetensors and JSON, whole or not there at
all.

``checkpoints/step_0000500/`` holds ``model.safetensors``, ``ema.safetensors``, ``optimizer.safetensors`` and
``state.json``. There is no state of a random generator: every draw is a function of the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dydit_cli.artifacts import artifact_folder, write_json
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.training.average import MovingAverage
from dydit_cli.training.optimiser import load_state_by_name, state_by_name

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
    """

    model: DynamicModel
    average: MovingAverage
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None


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

    Raises:
        DyditError: if the disk refuses; older checkpoints are untouched then.
    """
    path = out / FOLDER / f"step_{step:07d}"
    with artifact_folder(path, overwrite=True) as temporary:
        save_file(_contiguous(training.model.state_dict()), temporary / "model.safetensors")
        save_file(_contiguous(training.average.model.state_dict()), temporary / "ema.safetensors")
        save_file(state_by_name(training.optimiser, training.model), temporary / "optimizer.safetensors")
        scaler = training.scaler.state_dict() if training.scaler is not None else None
        write_json(temporary / "state.json", {"schema": SCHEMA, "step": step, "scaler": scaler, **facts})
    for older in checkpoints(out)[:-keep]:
        shutil.rmtree(older.path, ignore_errors=True)
    return path


def checkpoints(out: Path) -> list[Checkpoint]:
    """The checkpoints of a run folder, by step."""
    found = []
    for state in (out / FOLDER).glob("*/state.json"):
        # A temporary folder of a killed process begins with a dot; it is not whole.
        if state.parent.name.startswith("."):
            continue
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            found.append(Checkpoint(state.parent, int(content["step"]), content))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(state.parent, error) from error
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def read_checkpoint(checkpoint: Checkpoint, training: Training) -> None:
    """Put a checkpoint's numbers into the parts of a run.

    Raises:
        DyditError: if a file is missing or damaged, or is of another model.
    """
    try:
        training.model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
        training.average.model.load_state_dict(load_file(checkpoint.path / "ema.safetensors"))
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
        fix="Delete this folder to resume from the checkpoint before it, or start again with --overwrite.",
    )
