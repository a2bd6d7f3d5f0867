"""A start that works before training: what each range of timesteps can do without, measured, and routers that say so."""

from __future__ import annotations

from dydit_cli.conversion.calibration.calibrate import (
    Calibrated,
    Tables,
    calibrate,
    calibrate_folder,
    calibrate_model,
    check_calibration,
)
from dydit_cli.conversion.calibration.report import Calibration, RangeReport
from dydit_cli.conversion.calibration.storing import write_tables

__all__ = [
    "Calibrated",
    "Calibration",
    "RangeReport",
    "Tables",
    "calibrate",
    "calibrate_folder",
    "calibrate_model",
    "check_calibration",
    "write_tables",
]
