"""What a calibrated model keeps at which timesteps, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.conversion.calibration import Calibration


def calibration_table(made: Calibration) -> Table:
    """A row for each range of timesteps, from noise to the image."""
    from rich.table import Table

    table = Table(
        title=f"Calibrated to {made.target_ratio:g}: {made.rounds} rounds of {made.samples} samples",
        title_justify="left",
    )
    for column in ("t", "noise", "heads", "MLP groups", "ratio"):
        table.add_column(column, justify="right")
    for part in sorted(made.ranges, key=lambda part: -part.noise_level):
        # A diffusion's timesteps are whole numbers, a flow's lie between 0 and 1.
        digits = 0 if part.last > 1 else 2
        table.add_row(
            f"{part.first:.{digits}f} – {part.last:.{digits}f}",
            f"{part.noise_level:.2f}",
            f"{part.heads:.0%}",
            f"{part.groups:.0%}",
            f"{part.ratio:.2f}",
        )
    table.add_row("all", "", "", "", f"{made.ratio:.3f}", style="bold")
    return table
