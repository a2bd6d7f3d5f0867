"""How `dydit profile` shows a report: a summary, time and memory, and the noise levels with bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from dydit_cli.profiling.latency import LatencyReport
    from dydit_cli.profiling.profile import CountedGmacs, ProfileReport
    from dydit_cli.profiling.shares import TimestepShares

TABLE_ROWS = 10
BAR = 10


def tables(report: ProfileReport) -> Iterator[Table]:
    """The report as tables; parts that were not measured are left out."""
    yield summary(report)
    if report.latency is not None:
        yield latency_table(report.latency)
    if report.model["execution"] != "static":
        yield timestep_table(report.timesteps)


def summary(report: ProfileReport) -> Table:
    """The numbers of the whole model."""
    static = report.model["execution"] == "static"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", _model_words(report))
    for place, row in enumerate(_static_rows(report) if static else _dynamic_rows(report)):
        table.add_row(*row, style="bold" if place == 0 else "")
    for name, counted in report.counted.items():
        at = "" if counted.t is None else f" at t = {counted.t:.4g}"
        table.add_row("counted", f"{name}{at}: {_counted_words(counted)}")
    return table


def _static_rows(report: ProfileReport) -> Iterator[tuple[str, str]]:
    yield "MACs", f"{macs(report.static_gmacs)} {_one(report)}, LayerNorm included (fvcore's convention)"
    yield "", f"{macs(report.static_gmacs_without_layernorm)} without LayerNorm (torch's convention)"
    yield (
        "parameters",
        f"{_count(report.params.static)}, and {_count(report.params.routers)} of routers once converted",
    )


def _one(report: ProfileReport) -> str:
    """What a count is of."""
    return "a video" if report.model.get("num_frames") else "an image"


def _dynamic_rows(report: ProfileReport) -> Iterator[tuple[str, str]]:
    params = report.params
    yield "ratio", f"{report.ratio:.4f} of the static model's attention and MLP MACs are executed"
    yield "total ratio", f"{report.total_ratio:.4f} of all its MACs, routers included"
    if report.trajectory_ratio is not None:
        yield (
            "trajectory ratio",
            f"{report.trajectory_ratio:.4f} along the way of sampled images, guidance included",
        )
    yield (
        "MACs",
        f"{macs(report.gmacs)} of {macs(report.static_gmacs)} {_one(report)}; without LayerNorm "
        f"{macs(report.gmacs_without_layernorm)} of {macs(report.static_gmacs_without_layernorm)}",
    )
    yield (
        "parameters",
        f"{_count(params.total)}, of which routers {_count(params.routers)} ({params.routers / params.total:.2%})",
    )


def latency_table(latency: LatencyReport) -> Table:
    """Time and memory of the three executions."""
    images = "1 image" if latency.batch == 1 else f"{latency.batch} images"
    table = _table(
        f"a forward of {images}: {latency.device}, {latency.dtype}",
        "<execution",
        ">time",
        ">of static",
        ">95% interval",
        "<memory beside the weights",
    )
    low, high = latency.interval
    for name, milliseconds, ratio, interval in (
        ("static", latency.static_ms, 1.0, ""),
        ("dense", latency.dense_ms, latency.dense_ratio, ""),
        ("compact", latency.compact_ms, latency.ratio, f"{low:.3f} to {high:.3f}"),
    ):
        memory = f"{latency.peak_mib[name]:.4g} MiB"
        if name == "compact":
            memory += f" + {latency.packed_mib:.4g} packed"
        table.add_row(name, f"{milliseconds:.4g} ms", f"{ratio:.3f}", interval, memory)
    return table


def timestep_table(timesteps: Sequence[TimestepShares]) -> Table:
    """What is on at a few noise levels, the noisiest first."""
    table = _table(
        "on average over images and blocks, by noise level",
        ">t",
        ">noise",
        "<heads",
        "<groups",
        "<tokens",
        ">ratio",
        ">MACs",
    )
    for row in _spread(sorted(timesteps, key=lambda row: -row.noise_level), TABLE_ROWS):
        bars = (bar(share) for share in (row.heads, row.groups, row.tokens))
        table.add_row(f"{row.t:.4g}", f"{row.noise_level:.3f}", *bars, f"{row.ratio:.3f}", macs(row.gmacs))
    return table


def bar(share: float) -> str:
    """A share as a bar of eighths and a number."""
    eighths = round(share * BAR * 8)
    filled = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return f"{filled:<{BAR}} {share:4.0%}"


def macs(gmacs: float) -> str:
    """GMACs in a unit that suits them: 118.69 G, 43.68 M."""
    value, unit = (gmacs, "G") if gmacs >= 1 else (gmacs * 1000, "M")
    return f"{value:.2f} {unit}"


def _table(title: str, *columns: str) -> Table:
    """An empty table; the first letter of a column's name says whether it leans left (<) or right (>)."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column[1:], header_style="dim", justify="left" if column[0] == "<" else "right")
    return table


def _spread(rows: Sequence[TimestepShares], most: int) -> list[TimestepShares]:
    """At most ``most`` evenly spaced rows, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _counted_words(counted: CountedGmacs) -> str:
    sign = "=" if counted.agrees else "≠"
    return (
        f"formula {macs(counted.formula)} {sign} fvcore {macs(counted.fvcore)}; without LayerNorm "
        f"{macs(counted.formula_without_layernorm)} {sign} torch {macs(counted.torch)}"
    )


def _model_words(report: ProfileReport) -> str:
    model = report.model
    return (
        f"{model['title']}, {model['depth']} blocks of {model['hidden_size']} channels, {model['num_heads']} heads, "
        f"{model['num_groups']} groups, {model['num_tokens']} tokens"
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,}"
