"""How `dydit bench` shows a report: a line a row, and how a service would see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from dydit_cli.benchmarking.report import Accelerated, BenchReport
    from dydit_cli.benchmarking.service import ServiceReport


def bench_table(report: BenchReport) -> Table:
    """Ideal, realised, efficiency and interval of every row."""
    threads = f"{report.threads} thread" + ("" if report.threads == 1 else "s")
    clock = {"cpu": "processor time", "wall": "wall time"}[report.clock]
    what = "whole sampling runs" if report.rows[0].steps is not None else "forwards"
    columns = [
        "<what is on",
        ">images",
        ">static",
        ">compact",
        ">ideal",
        ">time ratio",
        ">95% interval",
        ">efficiency",
    ]
    if any(row.dense_ratio is not None for row in report.rows):
        columns.append(">dense")
    if any(row.compiled is not None for row in report.rows):
        columns += [">compiled", ">95% interval", ">efficiency"]
    if any(row.graphed is not None for row in report.rows):
        columns += [">graphs", ">95% interval", ">efficiency"]
    table = _table(f"{report.title}: {what}, {threads}, {clock}, {report.dtype}", columns)
    for row in report.rows:
        cells = [
            row.case,
            str(row.batch),
            f"{seconds(row.static_ms / 1000)} ({row.static})",
            seconds(row.compact_ms / 1000),
            f"{row.ideal:.3f}",
            f"{row.time_ratio:.3f}",
            _interval(row.interval),
            f"{row.efficiency:.2f}",
        ]
        if row.dense_ratio is not None:
            cells.append(f"{row.dense_ratio:.3f}")
        table.add_row(*cells, *_accelerated_cells(row.compiled), *_accelerated_cells(row.graphed))
    return table


def _accelerated_cells(found: Accelerated | None) -> list[str]:
    if found is None:
        return []
    return [f"{found.time_ratio:.3f}", _interval(found.interval), f"{found.efficiency:.2f}"]


def service_tables(report: ServiceReport) -> tuple[Table, Table]:
    """Requests, and the start."""
    threads = f"{report.threads} thread" + ("" if report.threads == 1 else "s")
    steps = report.rows[0].steps
    requests = _table(
        f"{report.title}: {report.rows[0].requests} requests of {steps} steps, {threads}, {report.dtype}",
        [
            "<execution",
            ">images a request",
            ">p50 an image",
            ">p95 an image",
            ">images a minute",
            ">ratio",
            ">peak memory",
        ],
    )
    for row in report.rows:
        requests.add_row(
            row.execution,
            str(row.batch),
            seconds(row.p50_s),
            seconds(row.p95_s),
            f"{row.images_per_minute:.4g}",
            f"{row.ratio:.3f}",
            "" if row.peak_mib is None else f"{row.peak_mib:.4g} MiB",
        )
    start = _table("start, once", ["<execution", ">load", ">plan", ">pack and first run", ">compile", ">all"])
    for name, cold in report.cold_start.items():
        start.add_row(
            name,
            "" if cold.load is None else seconds(cold.load),
            seconds(cold.plan),
            seconds(cold.pack),
            "" if cold.compile is None else seconds(cold.compile),
            seconds(cold.total),
        )
    return requests, start


def seconds(value: float) -> str:
    """A span in a unit that suits it: 12.3 ms, 4.56 s."""
    if value == 0:
        return "0"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def span(value: float) -> str:
    """A rough span for people: 40 s, 12 min, 2.5 h."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _table(title: str, columns: list[str]) -> Table:
    """An empty table; the first letter of a column's name says whether it leans left (<) or right (>)."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column[1:], header_style="dim", justify="left" if column[0] == "<" else "right")
    return table
