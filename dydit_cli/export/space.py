"""Room on the disk, looked at before gigabytes are written that will not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from dydit_cli.errors import DyditError

SPARE_BYTES = 1 << 20
"""Configurations, code and card."""


def check_space(folder: Path, needed: int) -> None:
    """See that ``needed`` bytes fit where ``folder`` is.

    Raises:
        DyditError: If less is free than will be written.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise DyditError(
            f"The export needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free.",
            why="Weights and parts are written whole before anything is replaced.",
            fix="Free space, choose another --out, or write a smaller type with --dtype bfloat16.",
        )
