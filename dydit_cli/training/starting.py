"""From which ratio a run sets out: 1, unless its model was calibrated to less before any training."""

from __future__ import annotations

from pathlib import Path

from dydit_cli.artifacts.manifest import read_manifest
from dydit_cli.errors import DyditError


def start_of(model: str | Path) -> float:
    """The ratio that the width routers of a freshly converted model have, by its manifest.

    Args:
        model: Folder of the model. One that was trained already, or that has no manifest, counts as complete, as it always has.
    """
    try:
        manifest = read_manifest(model)
    except DyditError:
        return 1.0
    calibration = manifest.get("results", {}).get("calibration")
    if manifest.get("stage") != "convert" or not calibration:
        return 1.0
    return float(calibration["ratio"])
