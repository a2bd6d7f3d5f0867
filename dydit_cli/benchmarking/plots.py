"""The picture of a benchmark: for each row what arithmetic promises, and where the measured times lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dydit_cli.artifacts import writing
from dydit_cli.benchmarking.report import Accelerated, BenchReport, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, FAINT, PROMISE, COMPACT = "#22303c", "#8a97a3", "#cfe3df", "#0f3f5c"
COMPILED, GRAPHED = "#d9822b", "#8c5fa8"

LEGEND = IDEAL, COMPACT_MARK, COMPILED_MARK, GRAPHED_MARK, DENSE_MARK = (
    "ideal (MACs)",
    "compact, 95 % interval",
    "compiled, over static compiled",
    "CUDA graphs, over static graphs",
    "dense",
)

ROW_INCHES, HEAD_INCHES, FOOT_INCHES = 0.52, 1.12, 0.66


def write_plot(path: Path, report: BenchReport) -> None:
    """Write the picture as PNG."""
    with writing(path):
        bench_figure(report).savefig(path, dpi=DPI, facecolor="white")


def bench_figure(report: BenchReport) -> Figure:
    """A line a row: a bar up to the ideal, and marks where compact, dense and compiled execution are; static stands at 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = 9.0, HEAD_INCHES + FOOT_INCHES + ROW_INCHES * len(report.rows)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.31, FOOT_INCHES / height, 0.52, 1 - (HEAD_INCHES + FOOT_INCHES) / height))
    for place, row in enumerate(report.rows):
        _draw(axes, place, row)
    axes.axvline(1, color=INK, linewidth=1.1, zorder=1)
    marks = [1.0, *(value for row in report.rows for value in _values(row))]
    axes.set(xlim=(0, 1.06 * max(marks)), ylim=(len(report.rows) - 0.45, -0.55))
    axes.set_yticks(range(len(report.rows)), labels=[_label(row) for row in report.rows])
    axes.set_xlabel("time, static = 1", labelpad=6)
    axes.xaxis.label.set(color=FAINT, size=9)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK, pad=6)
    axes.grid(axis="x", color="#e8ecef", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _columns(axes, report)
    figure.text(
        0.02, 1 - 0.16 / height, f"Time against arithmetic, {report.title}", fontsize=12.5,
        fontweight="bold", color=INK, va="top",
    )  # fmt: skip
    figure.text(0.02, 1 - 0.43 / height, _how(report), fontsize=9, color=FAINT, va="top")
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in LEGEND if label in named]
    figure.legend(
        [named[label] for label in labels],
        labels,
        loc="upper left",
        bbox_to_anchor=(0.012, 1 - 0.62 / height),
        ncols=len(labels),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handletextpad=0.5,
        columnspacing=1.6,
        borderpad=0,
    )
    return figure


def _columns(axes: Axes, report: BenchReport) -> None:
    """Time ratio and efficiency in numbers, beside the marks; those of accelerated execution below them."""
    right = axes.get_yaxis_transform()
    for x, heading in ((1.03, "time"), (1.14, "efficiency")):
        axes.text(x, -0.6, heading, transform=right, color=FAINT, fontsize=8.5, va="bottom")
    for place, row in enumerate(report.rows):
        lines = [(row.time_ratio, row.efficiency, COMPACT)]
        lines += [(found.time_ratio, found.efficiency, color) for found, color, *_ in _accelerated(row)]
        for line, (ratio, efficiency, color) in enumerate(lines):
            height = place + (line - (len(lines) - 1) / 2) * 0.4
            for x, text in ((1.03, f"{ratio:.3f}"), (1.14, f"{efficiency:.2f}")):
                axes.text(
                    x,
                    height,
                    text,
                    transform=right,
                    color=color,
                    fontsize=9.5,
                    fontweight="bold",
                    va="center",
                )


def _draw(axes: Axes, place: int, row: Row) -> None:
    """One row."""
    axes.barh(place, row.ideal, height=0.62, color=PROMISE, label=IDEAL, zorder=2)
    if row.dense_ratio is not None:
        axes.plot(
            row.dense_ratio, place, "o", markersize=6, markerfacecolor="white", markeredgecolor=FAINT,
            label=DENSE_MARK, zorder=4,
        )  # fmt: skip
    low, high = row.interval
    axes.errorbar(
        row.time_ratio, place, xerr=[[row.time_ratio - low], [high - row.time_ratio]], fmt="o", markersize=7,
        color=COMPACT, elinewidth=2.2, capsize=3.5, label=COMPACT_MARK, zorder=6,
    )  # fmt: skip
    for found, color, shape, label in _accelerated(row):
        middle, (low, high) = found.time_ratio, found.interval
        axes.errorbar(
            middle, place, xerr=[[middle - low], [high - middle]], fmt=shape, markersize=6, color=color,
            elinewidth=2.2, capsize=3.5, label=label, zorder=5,
        )  # fmt: skip


def _accelerated(row: Row) -> list[tuple[Accelerated, str, str, str]]:
    """What was accelerated, with the colour, shape and name of its mark."""
    marks = ((row.compiled, COMPILED, "D", COMPILED_MARK), (row.graphed, GRAPHED, "s", GRAPHED_MARK))
    return [(found, color, shape, label) for found, color, shape, label in marks if found is not None]


def _values(row: Row) -> list[float]:
    values = [row.ideal, row.interval[1], row.dense_ratio or 0.0]
    return [*values, *(found.interval[1] for found, *_ in _accelerated(row))]


def _label(row: Row) -> str:
    batch = f"{row.batch} image" + ("" if row.batch == 1 else "s")
    what = batch if row.steps is None else f"{batch}, {row.steps} steps"
    return f"{what}\n{row.case}"


def _how(report: BenchReport) -> str:
    threads = f"{report.threads} thread" + ("" if report.threads == 1 else "s")
    place = f"CPU, {threads}" if report.device.startswith("cpu") else report.device
    clock = {"cpu": "processor time", "wall": "wall time"}[report.clock]
    pairs = report.rows[0].pairs
    return (
        f"{place}, {report.dtype}, {clock}, medians of {pairs} interleaved pair{'' if pairs == 1 else 's'}, "
        f"torch {report.versions['torch']}"
    )
