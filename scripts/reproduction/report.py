"""The report: results as JSON, and a page with tables and plots made of that JSON alone. Nothing in it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import atomic_write, write_json
from scripts.reproduction.cells import VALIDATED
from scripts.reproduction.remedy_report import remedy_lines
from scripts.reproduction.verdicts import Row, RowKey, best_pruning, pooled_spread, table_of, verdicts

SCHEMA = 1
NOT_MEASURED = "not measured"
TITLES = {
    "base": "base model, not trained further",
    "static-control": "static control",
    "dynamic": "dynamic",
    "pruned-random": "pruned at random",
    "pruned-magnitude": "pruned by magnitude",
    "pruned-taylor": "pruned by Taylor",
    "lora": "dynamic, LoRA",
    "td-lora": "dynamic, TD-LoRA",
    "ordered": "dynamic, ordered width",
    "budgets": "dynamic, budgets",
    "random-routers": "random routers",
    "width-only": "width alone (TDW)",
    "tokens-only": "tokens alone (SDT)",
}
COLOURS = {"dynamic": "#1f6f8b", "static-control": "#222222", "base": "#888888"}
PRUNED_COLOUR, OTHER_COLOUR = "#c05621", "#6b8e23"
METRICS = {
    "spatial_frechet": "sFID",
    "kernel": "KID×1000",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
}


def results_of(
    cells: Sequence[Mapping[str, Any]],
    expected: Sequence[RowKey],
    circumstances: Mapping[str, Any],
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was found, for ``results.json``.

    Args:
        cells: Results of the cells that have run.
        expected: Rows of the protocol, measured or not.
        circumstances: What all of them share.
        choices: Learning rates by family and kind, each with the validation distances that chose it.
    """
    grouped: dict[RowKey, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["group"] not in VALIDATED:
            grouped.setdefault((cell["family"], cell["arm"], cell["lambda"], cell["variant"]), []).append(
                cell
            )
    table = table_of(grouped)
    return {
        "schema": SCHEMA,
        "circumstances": dict(circumstances),
        "headline": _headline(table),
        "headline_notes": _headline_notes(table),
        "verdicts": {
            family: [each.as_dict() for each in verdicts(table, family)] for family in ("dit", "sit")
        },
        "spread_over_seeds": pooled_spread(table),
        "choices": dict(choices),
        "rows": [_row(key, table.get(key), grouped.get(key, [])) for key in expected],
        "cells": [dict(cell) for cell in cells],
    }


def _headline(table: Mapping[RowKey, Row]) -> dict[str, Any]:
    pruned = best_pruning(table, "dit", 0.5)
    rows = {
        "dynamic_0.5": table.get(("dit", "dynamic", 0.5, "")),
        "dynamic_0.3": table.get(("dit", "dynamic", 0.3, "")),
        "static_control": table.get(("dit", "static-control", 1.0, "")),
        "best_static_pruning_0.5": pruned[1] if pruned else None,
        "td_lora_0.5": table.get(("dit", "td-lora", 0.5, "")),
    }
    return {name: _short(row) for name, row in rows.items()}


def _headline_notes(table: Mapping[RowKey, Row]) -> dict[str, Any]:
    """What the headline's numbers are, where these alone do not say it."""
    pruned = best_pruning(table, "dit", 0.5)
    return {
        "fd": "Fréchet distance to the test reference, mean over seeds; null is not measured",
        "fd_std": "standard deviation over seeds where there are several, else of sampling alone; see rows[].fd_std_of",
        "best_static_pruning_0.5": None if pruned is None else pruned[0].removeprefix("pruned-"),
    }


def _short(row: Row | None) -> dict[str, float | None]:
    """Null is not measured."""
    return {
        "fd": None if row is None else row.fd,
        "fd_std": None if row is None else row.fd_std,
        "gmacs": None if row is None else row.gmacs,
        "seconds_per_image": None if row is None else row.seconds_per_image,
    }


def _row(key: RowKey, row: Row | None, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    family, arm, ratio, variant = key
    found: dict[str, Any] = {"family": family, "arm": arm, "lambda": ratio, "variant": variant}
    if row is None:
        return {**found, "state": NOT_MEASURED}
    metrics = {
        name: sum(cell["metrics"][name]["value"] for cell in cells) / len(cells)
        for name in METRICS
        if all(name in cell["metrics"] for cell in cells)
    }
    return {
        **found,
        "state": "measured",
        **_short(row),
        "fd_std_of": row.fd_std_of,
        "fds": list(row.distances),
        "seeds": list(row.seeds),
        "ratio": row.ratio,
        "trajectory_ratio": row.trajectory_ratio,
        "time_ratio": row.time_ratio,
        "learning_rate": row.rate,
        "parameters": cells[0]["parameters"],
        "metrics": metrics,
        "commands": cells[0]["commands"],
    }


def write_report(results: Mapping[str, Any], folder: Path, *, quick: bool) -> list[Path]:
    """Write ``results.json``, ``results.md`` and the plots; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    write_json(folder / "results.json", results)
    plots = []
    for name, field, label in (
        ("results_macs.png", "gmacs", "MMACs a forward, as executed while sampling"),
        ("results_time.png", "seconds_per_image", "ms an image, measured side by side"),
    ):
        if plot(results, images / name, field, label):
            plots.append(name)
    text = page(results, plots, quick=quick)
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [folder / "results.json", folder / "results.md", *(images / name for name in plots)]


def page(results: Mapping[str, Any], plots: Sequence[str], *, quick: bool) -> str:
    """The page, from the results alone."""
    around = results["circumstances"]
    parts = ["# Results", ""]
    if quick:
        parts += [
            "> **A quick run: few steps, few samples, one seed, the short base models, packaged data. It shows that the "
            "machinery works, and is evidence of nothing.**",
            "",
        ]
    parts += [
        "Written by `python scripts/reproduce.py` out of `results.json`; no number is typed by hand. What is compared, how, and what was "
        "decided beforehand is in [protocol.md](protocol.md).",
        "",
        f"{around['images']:,} samples, {around['sampler_steps']} steps (DDIM for DiT, Euler for SiT), guidance 1; Fréchet distance to the "
        f"statistics of {around['reference_images']:,} training images by the network {around['hashes']['network'][:12]}. "
        f"{around['cells_done']} of {around['cells_all']} cells have run on {around['device']}. "
        f"Learning rates: {around['learning_rates']}.",
        "",
        "## Verdicts",
        "",
    ]
    for family, found in results["verdicts"].items():
        if all(each["outcome"] == NOT_MEASURED for each in found):
            continue
        parts += [
            f"{_family(family)}:",
            "",
            "| | claimed beforehand | verdict | Fréchet distances |",
            "| --- | --- | --- | --- |",
        ]
        parts += [
            f"| {each['name']} | {each['statement']} | **{each['outcome']}** | {each['text']} |"
            for each in found
        ]
        parts.append("")
    if all(each["outcome"] == NOT_MEASURED for found in results["verdicts"].values() for each in found):
        parts += ["None could be reached yet.", ""]
    for family in ("dit", "sit"):
        parts += _table(results, family)
    if plots:
        parts += ["## Quality against cost", ""]
        parts += [f"![{name.removesuffix('.png').replace('_', ' ')}](images/{name})\n" for name in plots]
        parts += [
            "Error bars: one standard deviation, over seeds where there are several, else of sampling alone.",
            "",
        ]
    parts += remedy_lines(results.get("remedies", []), TITLES)
    parts += _chosen(results)
    parts += _code(around.get("codes", {}))
    parts += _commands(results)
    return "\n".join(parts).rstrip() + "\n"


def _family(name: str) -> str:
    return {"dit": "DiT", "sit": "SiT"}[name]


def _table(results: Mapping[str, Any], family: str) -> list[str]:
    rows = [row for row in results["rows"] if row["family"] == family]
    if not rows:
        return []
    heading = [
        "",
        "λ",
        "Fréchet ↓",
        "seeds",
        "MMACs ↓",
        "ratio held out",
        "on trajectories",
        "time of control ↓",
        "ms an image ↓",
    ]
    heading += list(METRICS.values())
    lines = [f"## {_family(family)}", "", f"| {' | '.join(heading)} |"]
    lines.append("| --- |" + " ---: |" * (len(heading) - 1))
    for row in rows:
        title = TITLES.get(row["arm"], row["arm"]) + (f" ({row['variant']})" if row["variant"] else "")
        lam = "" if row["arm"] in ("base", "static-control") else f"{row['lambda']:g}"
        if row["state"] == NOT_MEASURED:
            lines.append(f"| {title} | {lam} | {NOT_MEASURED} |" + " |" * (len(heading) - 3))
            continue
        metrics = row["metrics"]
        values = [
            title,
            lam,
            f"{row['fd']:.3f} ± {row['fd_std']:.3f}",
            str(len(row["seeds"])),
            f"{row['gmacs'] * 1e3:.2f}",
            _number(row["ratio"], ".4f"),
            _number(row["trajectory_ratio"], ".4f"),
            _number(row["time_ratio"], ".3f"),
            _number(row["seconds_per_image"], ".2f", 1e3),
            *(
                _number(
                    metrics.get(name), ".3f" if name != "kernel" else ".1f", 1e3 if name == "kernel" else 1
                )
                for name in METRICS
            ),
        ]
        lines.append(f"| {' | '.join(values)} |")
    lines += [
        "",
        "± is one standard deviation: over seeds where there are several, else of sampling alone.",
        "",
    ]
    return lines


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)


def _chosen(results: Mapping[str, Any]) -> list[str]:
    choices = results["choices"]
    if not choices:
        return []
    lines = [
        "## Learning rates, chosen on the validation split",
        "",
        "| | chosen | validation distance at each rate |",
    ]
    lines.append("| --- | ---: | --- |")
    for name, found in choices.items():
        rates = ", ".join(f"{float(rate):g}: {value:.3f}" for rate, value in found["distances"].items())
        lines.append(f"| {name} | {found['rate']:g} | {rates} |")
    return [*lines, ""]


def _code(codes: Mapping[str, int]) -> list[str]:
    """Whether all cells ran the same code: its version number stays while it is edited."""
    if not codes:
        return []
    if len(codes) == 1:
        text = f"All cells ran the same code (hash {next(iter(codes))} of the package's computing parts)."
    else:
        listed = ", ".join(f"{code}: {count}" for code, count in codes.items())
        text = f"The package's computing parts had {len(codes)} states while the cells ran (hash: cells that ran under it): {listed}."
    return ["## Code", "", text, ""]


def _commands(results: Mapping[str, Any]) -> list[str]:
    lines = ["## Commands", "", "Each row's first seed; `scripts/reproduce.py` runs these.", ""]
    for row in results["rows"]:
        if row["state"] == NOT_MEASURED:
            continue
        name = " ".join(
            part
            for part in (_family(row["family"]), row["arm"], f"{row['lambda']:g}", row["variant"])
            if part
        )
        lines += [
            f"<details><summary>{name}</summary>",
            "",
            "```sh",
            *row["commands"],
            "```",
            "",
            "</details>",
            "",
        ]
    return lines if len(lines) > 4 else []


def plot(results: Mapping[str, Any], file: Path, field: str, label: str) -> bool:
    """Draw distance against a cost; false where nothing has it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    families = [
        family
        for family in ("dit", "sit")
        if any(_has(row, field) for row in results["rows"] if row["family"] == family)
    ]
    if not families:
        return False
    figure = Figure(figsize=(6.4 * len(families), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        rows = [row for row in results["rows"] if row["family"] == family and _has(row, field)]
        line = sorted(
            (row[field] * 1e3, row["fd"]) for row in rows if row["arm"] == "dynamic" and not row["variant"]
        )
        panel.plot(*zip(*line, strict=True), color=COLOURS["dynamic"], lw=1, alpha=0.6) if len(
            line
        ) > 1 else None
        for row in rows:
            colour = COLOURS.get(
                row["arm"], PRUNED_COLOUR if row["arm"].startswith("pruned-") else OTHER_COLOUR
            )
            panel.errorbar(
                row[field] * 1e3,
                row["fd"],
                yerr=row["fd_std"],
                fmt=_marker(row["arm"]),
                color=colour,
                capsize=3,
                ms=6,
            )
            # What shares a cost with the dynamic row is named on its other side.
            beside = colour == OTHER_COLOUR
            panel.annotate(
                _label(row),
                (row[field] * 1e3, row["fd"]),
                xytext=(-7 if beside else 7, -3),
                textcoords="offset points",
                ha="right" if beside else "left",
                fontsize=7,
                color=colour,
            )
        panel.set_title(_family(family))
        panel.set_xlabel(label)
        panel.set_ylabel("Fréchet distance (lower is better)")
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(StrMethodFormatter("{x:g}"))
        panel.tick_params(axis="y", which="both", labelsize=7)
        panel.margins(x=0.16, y=0.1)
        panel.grid(alpha=0.25, which="both")
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return True


def _has(row: Mapping[str, Any], field: str) -> bool:
    return row["state"] != NOT_MEASURED and row.get(field) is not None


def _marker(arm: str) -> str:
    return "s" if arm.startswith("pruned-") else "D" if arm in ("static-control", "base") else "o"


def _label(row: Mapping[str, Any]) -> str:
    names = {
        "static-control": "control",
        "pruned-random": "random",
        "pruned-magnitude": "magnitude",
        "pruned-taylor": "Taylor",
    }
    name = names.get(row["arm"], row["arm"])
    lam = "" if row["arm"] in ("static-control", "base") else f" {row['lambda']:g}"
    return f"{name}{lam}" + (f" {row['variant']}" if row["variant"] else "")


def read_results(file: Path) -> dict[str, Any]:
    """What `write_report` wrote."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
