"""How `dydit evaluate` shows a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from dydit_cli.cli.bench_tables import seconds

if TYPE_CHECKING:
    from dydit_cli.evaluation.metrics.measure import Measure
    from dydit_cli.evaluation.pairs.comparison import Summary
    from dydit_cli.evaluation.report import EvaluationReport, PairsReport

TITLES = {
    "frechet": "Fréchet distance",
    "spatial_frechet": "Fréchet, spatial (sFID)",
    "kernel": "kernel distance (KID) × 1000",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
    "temporal_frechet": "Fréchet, temporal (ours)",
}
SCALES = {"kernel": 1000.0}
LOWER = frozenset({"frechet", "spatial_frechet", "kernel", "temporal_frechet", "lpips"})
PAIRED = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip": "CLIP score",
    "clip_against": "CLIP score, static",
}


def facts_table(report: EvaluationReport) -> Table:
    """What was evaluated, with what, at which cost."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    subject = report.subject
    what = f"{report.images} images"
    if report.videos is not None:
        what = f"{report.videos} videos of {report.images // report.videos} frames"
    table.add_row("evaluated", f"{subject['path']}: {what}")
    if made := made_by(subject.get("made_by") or {}):
        table.add_row("made by", made)
    if report.reference is not None:
        count = report.reference.get("images") or report.reference.get("videos")
        number = (
            "" if count is None else f" ({count} {'videos' if 'videos' in report.reference else 'images'})"
        )
        table.add_row("reference", f"{report.reference['path']}{number}")
    if report.extractor is not None:
        table.add_row("network", f"{report.extractor['name']}, sha256 {report.extractor['sha256'][:12]}")
    if report.cost is not None:
        cost = report.cost
        table.add_row(
            "cost",
            f"{_amount(cost.mmacs)} of {_amount(cost.static_mmacs)} a forward, ratio {cost.ratio.value:.3f}, "
            f"{cost.parameters / 1e6:.3g} M parameters",
        )
        if cost.seconds_per_image is not None:
            table.add_row("time", f"{_time(cost.seconds_per_image)} an image, measured while evaluating")
    table.add_row("device", f"{report.device}, torch {report.versions['torch']}")
    return table


def made_by(facts: dict[str, Any]) -> str:
    """Sampler, steps, guidance, seed, execution and type of numbers, as far as they are known."""
    words = {
        "sampler": "{}",
        "steps": "{} steps",
        "guidance": "guidance {:g}",
        "seed": "seed {}",
        "execution": "{}",
        "dtype": "{}",
    }
    return ", ".join(form.format(facts[key]) for key, form in words.items() if facts.get(key) is not None)


def metrics_table(report: EvaluationReport) -> Table:
    """Every metric with its interval."""
    table = _table("quality", ["<metric", ">value", ">95% interval", "<", "<interval by"])
    for name, measure in report.metrics.items():
        scale = SCALES.get(name, 1.0)
        table.add_row(
            TITLES[name],
            number(measure.value * scale),
            interval(measure, scale),
            "lower is better" if name in LOWER else "higher is better",
            measure.method or "",
        )
    return table


def pairs_table(pairs: PairsReport) -> Table:
    """Pairs and yardsticks, a line each."""
    columns = ["<pairs", ">number"]
    for name in pairs.measures:
        columns += [f">{PAIRED[name]}", ">95% interval", ">median", ">worst"]
    table = _table(f"from the same seeds, against {pairs.against['path']}", columns)
    table.add_row("these two", str(pairs.count), *_cells(pairs.measures, list(pairs.measures)))
    for name, measures in pairs.yardsticks.items():
        table.add_row(
            f"yardstick: {name}",
            str(pairs.yardstick_count),
            *_cells(measures, list(pairs.measures)),
            style="dim",
        )
    return table


def number(value: float) -> str:
    """Four digits that matter."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def interval(measure: Measure, scale: float = 1.0) -> str:
    """From low to high, or nothing."""
    if measure.low is None or measure.high is None:
        return ""
    return f"{number(measure.low * scale)} to {number(measure.high * scale)}"


def _cells(measures: dict[str, Summary], names: list[str]) -> list[str]:
    cells: list[str] = []
    for name in names:
        if name not in measures:
            cells += [""] * 4
            continue
        summary = measures[name]
        cells += [
            number(summary.mean.value),
            interval(summary.mean),
            number(summary.median),
            number(summary.worst),
        ]
    return cells


def _amount(mmacs: float) -> str:
    return f"{mmacs / 1000:.4g} GMACs" if mmacs >= 1000 else f"{mmacs:.4g} MMACs"


def _time(measure: Measure) -> str:
    if measure.low is None or measure.high is None:
        return seconds(measure.value)
    return f"{seconds(measure.value)} ({seconds(measure.low)} to {seconds(measure.high)})"


def _table(title: str, columns: list[str]) -> Table:
    """An empty table; the first letter of a column's name says whether it leans left (<) or right (>)."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column[1:], header_style="dim", justify="left" if column[0] == "<" else "right")
    return table
