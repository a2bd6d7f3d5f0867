"""The pictures of the results: quality against a cost, a panel for each family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import atomic_write
from scripts.reproduction.cells import FAMILIES
from scripts.reproduction.remedies import REMEDIED, variant_title

COLOURS = {"dynamic": "#1f6f8b", "static-control": "#222222", "base": "#888888"}
ALONE = ("static-control", "base")
"""Arms that have no ratio."""
PRUNED_COLOUR, OTHER_COLOUR = "#c05621", "#6b8e23"
NAMES = {
    "static-control": "control",
    "pruned-random": "random",
    "pruned-magnitude": "magnitude",
    "pruned-taylor": "Taylor",
    "lora": "LoRA",
    "td-lora": "TD-LoRA",
}


@dataclass(frozen=True)
class Scale:
    """What a row is drawn by.

    Attributes:
        field: Of a row.
        label: Of the axis.
        factor: From the row's unit to the axis's.
        error: The field of its standard deviation; None if there is none.
    """

    field: str
    label: str
    factor: float = 1
    error: str | None = None

    def of(self, row: Mapping[str, Any]) -> float:
        """Where a row stands on the axis."""
        return float(row[self.field]) * self.factor


@dataclass(frozen=True)
class Plot:
    """A picture of the page: ``quality`` against ``cost``."""

    file: str
    cost: Scale
    quality: Scale


DISTANCE = Scale("fd", "Fréchet distance (lower is better)", error="fd_std")
MACS = Scale("gmacs", "MMACs a forward, as executed while sampling", 1e3)
PLOTS = (
    Plot("results_macs.png", MACS, DISTANCE),
    Plot(
        "results_time.png",
        Scale("seconds_per_image", "ms an image, measured side by side", 1e3),
        DISTANCE,
    ),
    Plot(
        "results_loss.png",
        MACS,
        Scale("held_out_loss", "held-out loss (lower is better)"),
    ),
)
"""In the page's order."""
LABEL_GAP = 9.0
"""Least distance of two labels of a column, in points."""
COLUMN = 0.1
"""Points of a plot nearer than this, as a share of its width, have their labels in one column."""


def draw(results: Mapping[str, Any], plot: Plot, folder: Path) -> bool:
    """Write a plot of the rows that have both its values; false where none has.

    Args:
        results: As published.
        plot: Which.
        folder: Where its PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    of_family = {
        family: [
            row
            for row in results["rows"]
            if row["family"] == family
            and all(row.get(scale.field) is not None for scale in (plot.cost, plot.quality))
        ]
        for family in FAMILIES
    }
    families = [family for family, rows in of_family.items() if rows]
    if not families:
        return False
    figure = Figure(figsize=(7.4 * len(families), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        _draw(panel, of_family[family], plot)
        panel.set_title(FAMILIES[family])
    # Where points are on the page is known when the layout is.
    figure.draw_without_rendering()
    for panel, family in zip(panels, families, strict=True):
        _name(panel, of_family[family], plot)
    with atomic_write(folder / plot.file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return True


def apart(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions as little as it takes for neighbours to be ``gap`` apart; their order and their groups' means stay.

    Args:
        positions: In any order.
        gap: In their unit.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    # Groups of neighbours that touch: [sum of (position - place in the group), members].
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        total, members = positions[index], [index]
        while groups and total / len(members) - groups[-1][0] / len(groups[-1][1]) < gap * len(groups[-1][1]):
            before, earlier = groups.pop()
            total = before + total - gap * len(earlier) * len(members)
            members = earlier + members
        groups.append((total, members))
    moved = list(positions)
    for total, members in groups:
        for place, index in enumerate(members):
            moved[index] = total / len(members) + gap * place
    return moved


def _draw(panel: Any, rows: Sequence[Mapping[str, Any]], plot: Plot) -> None:
    from matplotlib.ticker import StrMethodFormatter

    cost, quality = plot.cost, plot.quality
    line = sorted(
        (cost.of(row), quality.of(row)) for row in rows if row["arm"] == "dynamic" and not row["variant"]
    )
    if len(line) > 1:
        panel.plot(*zip(*line, strict=True), color=COLOURS["dynamic"], lw=1, alpha=0.6)
    for row in rows:
        panel.errorbar(
            cost.of(row),
            quality.of(row),
            yerr=None if quality.error is None else row[quality.error],
            fmt=_marker(row["arm"]),
            color=_colour(row["arm"]),
            # Hollow: changed after the row had missed.
            markerfacecolor="white" if row["variant"].startswith(REMEDIED) else None,
            capsize=3,
            ms=6,
        )
    panel.set_xlabel(cost.label)
    panel.set_ylabel(quality.label)
    panel.set_yscale("log")
    for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis(StrMethodFormatter("{x:g}"))
    panel.tick_params(axis="y", which="both", labelsize=7)
    panel.margins(x=0.28, y=0.1)
    panel.grid(alpha=0.25, which="both")


def _name(panel: Any, rows: Sequence[Mapping[str, Any]], plot: Plot) -> None:
    """Write names beside the points: on the left of what shares a cost with the rows of the hypotheses and is none of them."""
    to_points = 72 / panel.figure.dpi
    placed = []
    for row in rows:
        x, y = panel.transData.transform((plot.cost.of(row), plot.quality.of(row)))
        column = round(panel.transAxes.inverted().transform((x, y))[0] / COLUMN)
        placed.append((row, (column, _is_beside(row)), y * to_points))
    for side in {side for _, side, _ in placed}:
        here = [(row, height) for row, found, height in placed if found == side]
        for (row, height), moved in zip(here, apart([height for _, height in here], LABEL_GAP), strict=True):
            left = side[1]
            panel.annotate(
                _label(row),
                (plot.cost.of(row), plot.quality.of(row)),
                xytext=(-7 if left else 7, moved - height),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=7,
                color=_colour(row["arm"]),
            )


def _is_beside(row: Mapping[str, Any]) -> bool:
    """Whether a row is another way to be dynamic, or a remedied one of a ratio."""
    return _colour(row["arm"]) == OTHER_COLOUR or (bool(row["variant"]) and row["arm"] not in ALONE)


def _colour(arm: str) -> str:
    return COLOURS.get(arm, PRUNED_COLOUR if arm.startswith("pruned-") else OTHER_COLOUR)


def _marker(arm: str) -> str:
    return "s" if arm.startswith("pruned-") else "D" if arm in ALONE else "o"


def _label(row: Mapping[str, Any]) -> str:
    name = NAMES.get(row["arm"], row["arm"])
    ratio = "" if row["arm"] in ALONE else f" {row['lambda']:g}"
    return f"{name}{ratio}" + (f", {variant_title(row['variant'], short=True)}" if row["variant"] else "")
