"""What a resumed run goes on from, and whether it can be the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts.manifest import device_description, versions
from dydit_cli.errors import DyditError
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.checkpoint import Checkpoint, Training, checkpoints, nameless, read_checkpoint


def resumable(settings: FinetuneSection, manifest: Mapping[str, Any]) -> list[Checkpoint]:
    """The checkpoints that ``out`` can be resumed from, the newest first; none of a run that ended before its first.

    Raises:
        DyditError: If what was there is damaged or gone, or has gone beyond what is asked for.
    """
    out = Path(settings.out)
    found = checkpoints(out)
    finished = bool(manifest.get("results", {}).get("completed"))
    if not found and (finished or nameless(out)):
        raise DyditError(
            f"The run in {out} has no checkpoint to resume from.",
            why="What lies there is damaged." if nameless(out) else "They were removed after it had ended.",
            fix="Start it again with --overwrite instead of --resume.",
        )
    if found and found[-1].step > settings.steps:
        raise DyditError(
            f"The run in {out} has done {found[-1].step} steps already; {settings.steps} are asked for.",
            why="A resumed run can be extended, not shortened.",
            fix=f"Set steps to {found[-1].step} or more.",
        )
    return found[::-1]


def restore(candidates: Sequence[Checkpoint], training: Training) -> tuple[Checkpoint, list[str]]:
    """Put the first checkpoint that can be read into the parts of a run.

    Going back further than needed costs time and nothing else: every draw is a function of seed and step, so the steps that are
    done again end with the same bits.

    Args:
        candidates: The newest first; at least one.
        training: The parts.

    Returns:
        It, and what to tell the user of those before it.

    Raises:
        DyditError: If none can be read.
    """
    failures: list[DyditError] = []
    for checkpoint in candidates:
        try:
            read_checkpoint(checkpoint, training)
        except DyditError as failure:
            failures.append(failure)
            continue
        return checkpoint, [
            f"{failure.what} {failure.why} The run goes on from step {checkpoint.step} instead."
            for failure in failures
        ]
    raise failures[0]


def differences(manifest: Mapping[str, Any], device: torch.device, settings: FinetuneSection) -> list[str]:
    """Why a resumed run may not be bit for bit the run that was started."""
    spread = ("processes", "sharding", "accumulate")
    before: dict[str, Any] = {
        **{name: manifest.get("settings", {}).get(name) for name in spread},
        **manifest.get("versions", {}),
        "device": manifest.get("device"),
        "threads": manifest.get("threads"),
    }
    now: dict[str, Any] = {
        **{name: getattr(settings, name) for name in spread},
        **versions(),
        "device": device_description(device),
        "threads": torch.get_num_threads(),
    }
    changed = [
        f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name) not in (None, now[name])
    ]
    if not changed:
        return []
    return [f"Resumed elsewhere than it was started, so not bit for bit the same run: {', '.join(changed)}."]
