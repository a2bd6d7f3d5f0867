"""The tables of a calibration, as a file of the artifact: what was measured and what was decided, router by router."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from dydit_cli.artifacts import atomic_write
from dydit_cli.conversion.calibration.calibrate import Tables

FILE = "calibration.safetensors"
SCHEMA = 1


def write_tables(folder: Path, tables: Tables) -> None:
    """Write ``calibration.safetensors``: of each router its units' importance (R, units) and which of them stay (R, units) of 0/1.

    Rows are ranges of timesteps in the order of the sampler's levels, columns are units by rank.
    """
    tensors = {}
    for place in tables.units.places:
        tensors[f"{place.name}.importance"] = tables.importance[:, place.columns].float().contiguous()
        tensors[f"{place.name}.kept"] = tables.kept[:, place.columns].to(torch.uint8).contiguous()
    with atomic_write(folder / FILE) as temporary:
        save_file(tensors, temporary, metadata={"schema": str(SCHEMA)})
