"""A comparison as text: rows of cells, and these as CSV, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.evaluation.gathering import (
    IMAGES,
    MMACS,
    PARAMETERS,
    RATIO,
    SECONDS,
    TIME_RATIO,
    Run,
)
from dydit_cli.evaluation.metrics.measure import Measure
from dydit_cli.evaluation.pairs.comparison import CLIP, CLIP_AGAINST, LPIPS, PSNR, SSIM
from dydit_cli.evaluation.scoring import (
    ACCURACY,
    FRECHET,
    KERNEL,
    PRECISION,
    RECALL,
    SCORE,
    SPATIAL,
    TEMPORAL,
)

TABLE, CSV, MARKDOWN, LATEX = "table", "csv", "markdown", "latex"
FORMATS = (TABLE, CSV, MARKDOWN, LATEX)


@dataclass(frozen=True)
class Column:
    """A column: which value, its title, by what it is multiplied, and which direction is better (↓, ↑ or nothing)."""

    key: str
    title: str
    scale: float = 1.0
    better: str = ""


COLUMNS = (
    Column(IMAGES, "N"),
    Column(FRECHET, "Fréchet", better="↓"),
    Column(SPATIAL, "sFID", better="↓"),
    Column(KERNEL, "KID×1000", 1000.0, better="↓"),
    Column(SCORE, "IS", better="↑"),
    Column(PRECISION, "precision", better="↑"),
    Column(RECALL, "recall", better="↑"),
    Column(ACCURACY, "accuracy", better="↑"),
    Column(TEMPORAL, "temporal", better="↓"),
    Column(PSNR, "PSNR", better="↑"),
    Column(SSIM, "SSIM", better="↑"),
    Column(LPIPS, "LPIPS", better="↓"),
    Column(CLIP, "CLIP", better="↑"),
    Column(CLIP_AGAINST, "CLIP, static"),
    Column(RATIO, "ratio", better="↓"),
    Column(MMACS, "MMACs", better="↓"),
    Column(PARAMETERS, "M params", 1e-6, better="↓"),
    Column(SECONDS, "ms/image", 1000.0, better="↓"),
    Column(TIME_RATIO, "time ratio", better="↓"),
)


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """The columns that any run fills."""
    return [column for column in COLUMNS if any(column.key in run.values for run in runs)]


def header(runs: Sequence[Run]) -> list[str]:
    """Titles of the columns, run and sampling first."""
    titles = [f"{column.title} {column.better}".strip() for column in columns_of(runs)]
    return ["run", "sampling", *titles]


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """A run a row, each value with ± half of its interval."""
    chosen = columns_of(runs)
    return [
        [run.name, run.sampling, *(with_error(run.values.get(column.key), column.scale) for column in chosen)]
        for run in runs
    ]


def with_error(measure: Measure | None, scale: float = 1.0, sign: str = "±") -> str:
    """A value and half of its interval, to two digits of the latter; four digits of a value without one; empty for none."""
    if measure is None:
        return ""
    value = measure.value * scale
    half = measure.half_width
    if half is None or half == 0 or not math.isfinite(half):
        return _four_digits(value)
    error = half * scale
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} {sign} {error:.{decimals}f}"


def _four_digits(value: float) -> str:
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def as_text(runs: Sequence[Run], kind: str) -> str:
    """The comparison as CSV, Markdown or LaTeX.

    Raises:
        DyditError: If ``kind`` is another.
    """
    writers = {CSV: _csv, MARKDOWN: _markdown, LATEX: _latex}
    if kind not in writers:
        raise DyditError(
            f"There is no format called '{kind}'.",
            why=f"The formats are {', '.join(FORMATS)}.",
            fix=did_you_mean(kind, FORMATS) or "Pass one of these with --format.",
        )
    return writers[kind](runs)


def _csv(runs: Sequence[Run]) -> str:
    """Values in their own units with both ends of the interval, unrounded: for programs."""
    keys = [column.key for column in columns_of(runs)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["run", "sampling", *(name for key in keys for name in (key, f"{key}_low", f"{key}_high"))]
    )
    for run in runs:
        cells: list[object] = []
        for key in keys:
            measure = run.values.get(key)
            ends = (measure.value, measure.low, measure.high) if measure is not None else (None, None, None)
            cells += ["" if end is None else repr(end) for end in ends]
        writer.writerow([run.name, run.sampling, *cells])
    return stream.getvalue()


def _markdown(runs: Sequence[Run]) -> str:
    titles = header(runs)
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *rows(runs)]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
}


def _latex(runs: Sequence[Run]) -> str:
    """A tabular for booktabs."""
    titles = header(runs)
    lines = [
        f"\\begin{{tabular}}{{ll{'r' * (len(titles) - 2)}}}",
        "\\toprule",
        f"{_latex_row(titles)} \\\\",
        "\\midrule",
        *(f"{_latex_row(row)} \\\\" for row in rows(runs)),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(_LATEX.get(character, character) for character in cell) for cell in cells)
