"""Scores of units by the key of their order, for models whose blocks are not all alike, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.artifacts import atomic_write, write_json
from dydit_cli.conversion.importance.scores import FILE, SCHEMA, SUMMARY
from dydit_cli.errors import DyditError
from dydit_cli.families.unit_weights import UnitWeights

SUFFIX = ".scores"


@dataclass(frozen=True)
class UnitScores:
    """How much each unit matters; larger is more.

    Attributes:
        scores: Key of the units' order -> (units,) fp32, by stored unit.
        method: magnitude, taylor, random, or what a user calls theirs.
        details: How they were made.
    """

    scores: Mapping[str, Tensor]
    method: str
    details: dict[str, Any]


def write_unit_scores(
    folder: Path, importance: UnitScores, orders: Mapping[str, Tensor], grouping: str
) -> None:
    """Write scores and orders as safetensors, and a summary as JSON, into ``folder``."""
    tensors = {f"{key}{SUFFIX}": value.contiguous() for key, value in importance.scores.items()}
    tensors |= {key: value.contiguous() for key, value in orders.items()}
    with atomic_write(folder / FILE) as temporary:
        save_file(tensors, temporary, metadata={"schema": str(SCHEMA), "method": importance.method})
    heads = {
        key: {
            "order": order.tolist(),
            "scores_by_rank": [round(float(value), 6) for value in importance.scores[key][order]],
        }
        for key, order in orders.items()
        if key.endswith("head_order")
    }
    summary = {"schema": SCHEMA, "method": importance.method, "grouping": grouping, **importance.details}
    write_json(folder / SUMMARY, {**summary, "heads": heads})


def read_unit_scores(path: Path, units: Sequence[UnitWeights]) -> UnitScores:
    """Read scores that an earlier conversion wrote: the file, or the folder that holds it.

    Raises:
        DyditError: If it is damaged, or made for another model.
    """
    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            names = set(stored.keys())
            found = {
                unit.order: stored.get_tensor(f"{unit.order}{SUFFIX}").float()
                for unit in units
                if f"{unit.order}{SUFFIX}" in names
            }
            method = (stored.metadata() or {}).get("method", "file")
    except (OSError, SafetensorError) as error:
        raise DyditError(
            f"{file} holds no importance scores.",
            why=f"It is no readable safetensors file of scores: {str(error)[:120]}",
            fix="Pass magnitude, taylor or random, or the importance.safetensors of an earlier conversion.",
        ) from error
    wrong = [unit.order for unit in units if unit.order not in found or len(found[unit.order]) != unit.units]
    if wrong:
        raise DyditError(
            f"The scores in {file} belong to another model.",
            why=f"Those of {len(wrong)} of this model's units are missing or of another number, first {wrong[0]}.",
            fix="Rank this model anew: --importance magnitude.",
        )
    return UnitScores(found, method, {"from": str(path), **_details(file)})


def _details(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.with_name(SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: content[key] for key in ("samples", "seed", "data") if key in content}
