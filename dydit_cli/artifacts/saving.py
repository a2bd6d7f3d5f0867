"""Write a model as diffusers does: `config.json` and (sharded) safetensors."""

from __future__ import annotations

import re
from pathlib import Path

from dydit_cli.artifacts.writing import writing
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel

SIZE = re.compile(r"\d+(\.\d+)?\s*(KB|MB|GB)", re.IGNORECASE)


def save_model(model: DynamicModel, folder: str | Path, max_shard_size: str = "5GB") -> None:
    """Save configuration and weights into ``folder``, in shards of at most ``max_shard_size``.

    Raises:
        DyditError: If the size is not one, or the disk refuses.
    """
    if not SIZE.fullmatch(max_shard_size):
        raise DyditError(
            f"'{max_shard_size}' is not a shard size.",
            why="A number and KB, MB or GB are expected.",
            fix="Write it like 5GB.",
        )
    with writing(Path(folder)):
        # diffusers returns without a word where a file has the folder's name.
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder), max_shard_size=max_shard_size, safe_serialization=True)
