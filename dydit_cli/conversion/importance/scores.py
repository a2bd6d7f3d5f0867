"""Scores of heads and channels, and their file: made once, reusable with ``--importance``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.artifacts import atomic_write, write_json
from dydit_cli.conversion.order import UnitOrder
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.errors import DyditError

FILE = "importance.safetensors"
SUMMARY = "importance.json"
SCHEMA = 1


@dataclass(frozen=True)
class Importance:
    """How much each unit matters; larger is more.

    Attributes:
        heads: (L, H) fp32, by stored head.
        channels: (L, mlp_hidden) fp32, by stored channel.
        method: magnitude, taylor, random, or what a user calls theirs.
        details: How the scores were made: samples, seed, data.
    """

    heads: Tensor
    channels: Tensor
    method: str
    details: dict[str, Any]


def write_importance(folder: Path, importance: Importance, order: UnitOrder) -> None:
    """Write scores and orders as safetensors, and a summary as JSON, into ``folder``."""
    tensors = {
        "head_scores": importance.heads.contiguous(),
        "channel_scores": importance.channels.contiguous(),
        "head_order": order.heads.contiguous(),
        "channel_order": order.channels.contiguous(),
    }
    with atomic_write(folder / FILE) as temporary:
        save_file(tensors, temporary, metadata={"schema": str(SCHEMA), "method": importance.method})
    write_json(
        folder / SUMMARY,
        {
            "schema": SCHEMA,
            "method": importance.method,
            "grouping": order.grouping,
            **importance.details,
            "blocks": [
                {
                    "head_order": heads.tolist(),
                    "head_scores_by_rank": [round(float(value), 6) for value in scores[heads]],
                    "group_scores_by_rank": [
                        round(float(value), 6)
                        for value in channel_scores[channels].unflatten(0, (order.num_groups, -1)).sum(dim=1)
                    ],
                }
                for heads, channels, scores, channel_scores in zip(
                    order.heads, order.channels, importance.heads, importance.channels, strict=True
                )
            ],
        },
    )


def read_importance(path: str | Path, geometry: Geometry) -> Importance:
    """Read scores that an earlier conversion wrote: the file, or the folder that holds it.

    Raises:
        DyditError: If it is missing, damaged, or made for another geometry.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            heads, channels = stored.get_tensor("head_scores"), stored.get_tensor("channel_scores")
            method = (stored.metadata() or {}).get("method", "file")
    except (OSError, SafetensorError) as error:
        raise DyditError(
            f"{file} holds no importance scores.",
            why=f"It is no readable safetensors file with head_scores and channel_scores: {str(error)[:120]}",
            fix="Pass magnitude, taylor or random, or the importance.safetensors of an earlier conversion.",
        ) from error
    expected = ((geometry.depth, geometry.num_heads), (geometry.depth, geometry.mlp_hidden))
    if (tuple(heads.shape), tuple(channels.shape)) != expected:
        raise DyditError(
            f"The scores in {file} belong to another model.",
            why=f"They are of shape {tuple(heads.shape)} and {tuple(channels.shape)}; this model needs {expected[0]} and {expected[1]}.",
            fix="Rank this model anew: --importance magnitude.",
        )
    return Importance(heads.float(), channels.float(), method, {"from": str(path), **_summary_details(file)})


def _summary_details(file: Path) -> dict[str, Any]:
    """Details of the summary beside a scores file, if it is there."""
    summary = file.with_name(SUMMARY)
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: content[key] for key in ("samples", "seed", "data") if key in content}
