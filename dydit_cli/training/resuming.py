"""What a resumed run goes on from, and whether it can be the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts.manifest import device_description, versions
from dydit_cli.errors import DyditError
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.checkpoint import Checkpoint, checkpoints


def newest_checkpoint(settings: FinetuneSection) -> Checkpoint:
    """The checkpoint that ``out`` is resumed from.

    Raises:
        DyditError: If there is none, or if it has gone beyond what is asked for.
    """
    out = Path(settings.out)
    found = checkpoints(out)
    if not found:
        raise DyditError(
            f"The run in {out} has no checkpoint to resume from.",
            why="It ended before its first checkpoint was written.",
            fix="Start it again with --overwrite instead of --resume.",
        )
    if found[-1].step > settings.steps:
        raise DyditError(
            f"The run in {out} has done {found[-1].step} steps already; {settings.steps} are asked for.",
            why="A resumed run can be extended, not shortened.",
            fix=f"Set steps to {found[-1].step} or more.",
        )
    return found[-1]


def differences(manifest: Mapping[str, Any], device: torch.device) -> list[str]:
    """Why a resumed run may not be bit for bit the run that was started."""
    before: dict[str, Any] = {
        **manifest.get("versions", {}),
        "device": manifest.get("device"),
        "threads": manifest.get("threads"),
    }
    now: dict[str, Any] = {
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
