"""The report: results as JSON, and a page with tables and plots made of that JSON alone. Nothing in it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import atomic_write, write_json
from dydit_cli.checkpoints.builtin import PREFIX
from scripts.reproduction.cells import FAMILIES, PRUNED, VALIDATED
from scripts.reproduction.pictures import PLOTS, draw
from scripts.reproduction.remedies import variant_title
from scripts.reproduction.remedy_report import remedy_lines
from scripts.reproduction.verdicts import (
    Planned,
    Row,
    RowKey,
    best_pruning,
    pooled_spread,
    table_of,
    verdicts,
)

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
LONG = "_long"
"""What the names of base models end with that were trained until they gained little."""
METRICS = {
    "spatial_frechet": "sFID",
    "kernel": "KID×1000",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
}


def results_of(
    cells: Sequence[Mapping[str, Any]],
    expected: Planned,
    circumstances: Mapping[str, Any],
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was found, for ``results.json``.

    Args:
        cells: Results of the cells that have run.
        expected: Rows of the protocol, measured or not, and how many seeds each is to have.
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
    spread = pooled_spread(table)
    return {
        "schema": SCHEMA,
        "circumstances": dict(circumstances),
        "headline": _headline(table),
        "headline_notes": _headline_notes(table),
        "verdicts": {
            family: [each.as_dict() for each in verdicts(table, family, expected)]
            for family in ("dit", "sit")
        },
        "spread_over_seeds": None if spread is None else asdict(spread),
        "choices": dict(choices),
        "rows": [
            _row(key, table.get(key), grouped.get(key, [])) | {"seeds_planned": expected[key]}
            for key in sorted(expected, key=_place)
        ],
        "cells": [dict(cell) for cell in cells],
    }


def _place(key: RowKey) -> tuple[Any, ...]:
    """Where a row stands: what all are compared with, the dynamic models with their prunings by λ, then other ways to be dynamic."""
    family, arm, ratio, variant = key
    first = ("static-control", "base")
    if arm in first:
        return family, 0, 0.0, first.index(arm), arm, variant
    together = ("dynamic", *PRUNED)
    if arm in together and not variant:
        return family, 1, -ratio, together.index(arm), arm, variant
    return family, 2, -ratio, list(TITLES).index(arm) if arm in TITLES else len(TITLES), arm, variant


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
        "gmacs": "of one forward for one image, as executed on average while sampling",
        "seconds_per_image": "of a whole sampling run: the paired ratio to the control's time, times the control's seconds; null is not "
        "measured",
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
        "held_out_loss": _mean_loss(cells),
        "ratio": row.ratio,
        "trajectory_ratio": row.trajectory_ratio,
        "time_ratio": row.time_ratio,
        "timing": next((cell["timing"] for cell in cells if "timing" in cell), None),
        "learning_rate": row.rate,
        "parameters": cells[0]["parameters"],
        "metrics": metrics,
        "commands": cells[0]["commands"],
    }


def _mean_loss(cells: Sequence[Mapping[str, Any]]) -> float | None:
    """Over seeds; None of the base, which no run has measured."""
    losses = [cell["held_out_loss"] for cell in cells]
    return None if None in losses else sum(losses) / len(losses)


def write_report(results: Mapping[str, Any], folder: Path, *, quick: bool) -> list[Path]:
    """Write ``results.json``, ``results.md`` and the plots; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    write_json(folder / "results.json", results)
    plots = [plot.file for plot in PLOTS if draw(results, plot, images)]
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
        f"{around['cells_done']} of {around['cells_all']} cells have run, on {', '.join(around['devices']) or 'nothing yet'}"
        f"{' with ' + '; '.join(around['versions']) if around['versions'] else ''}.",
        "",
        f"- **Base models**: {_bases(around['bases'])}.",
        f"- **Learning rates**: {around['learning_rates']}{_rates(results['rows'])}.",
        "- **± and 95 %**: ± is one standard deviation over seeds; of rows with one seed that of sampling alone, which takes samples for "
        "independent and is therefore too large, since classes come in turn. The 95 % interval of a ratio of two distances is that of "
        "Student's t on its logarithm, from the spread over seeds.",
        "- **Verdicts**: held if the whole interval fulfils the claim, missed if none of it does, undecided otherwise, and not measured "
        "while cells that it rests on have not run.",
        "",
        "## Verdicts",
        "",
    ]
    for family, found in results["verdicts"].items():
        base = around["bases"].get(family, "")
        if base.startswith(PREFIX) and not base.endswith(LONG):
            parts += _warning(family, base, results["rows"])
        if all(each["text"] == NOT_MEASURED for each in found):
            continue
        parts += [
            f"{FAMILIES[family]}:",
            "",
            "| | claimed beforehand | verdict | Fréchet distances |",
            "| --- | --- | --- | --- |",
        ]
        parts += [
            f"| {each['name']} | {each['statement']} | **{each['outcome']}** | {each['text']} |"
            for each in found
        ]
        parts.append("")
    if all(each["text"] == NOT_MEASURED for found in results["verdicts"].values() for each in found):
        parts += ["None could be reached yet.", ""]
    for family in ("dit", "sit"):
        parts += _table(results, family)
    if plots:
        parts += ["## Quality against cost", ""]
        parts += [f"![{name.removesuffix('.png').replace('_', ' ')}](images/{name})\n" for name in plots]
        parts += [
            "Error bars of distances: one standard deviation, over seeds where there are several, else of sampling alone. "
            "Hollow: rows with a remedy that was chosen on the validation split.",
            "",
        ]
    parts += _by_loss(results["rows"])
    parts += remedy_lines(results.get("remedies", []), TITLES)
    parts += _chosen(results)
    parts += _code(around.get("codes", {}))
    parts += _commands(results)
    return "\n".join(parts).rstrip() + "\n"


def _table(results: Mapping[str, Any], family: str) -> list[str]:
    rows = [row for row in results["rows"] if row["family"] == family]
    if not rows:
        return []
    heading = [
        "",
        "λ",
        "Fréchet ↓",
        "seeds",
        "held-out loss ↓",
        "MMACs ↓",
        "ratio held out",
        "on trajectories",
        "time of control ↓",
        "ms an image ↓",
    ]
    heading += list(METRICS.values())
    lines = [f"## {FAMILIES[family]}", "", f"| {' | '.join(heading)} |"]
    lines.append("| --- |" + " ---: |" * (len(heading) - 1))
    for row in rows:
        title = TITLES.get(row["arm"], row["arm"]) + (
            f" ({variant_title(row['variant'])})" if row["variant"] else ""
        )
        lam = "" if row["arm"] in ("base", "static-control") else f"{row['lambda']:g}"
        if row["state"] == NOT_MEASURED:
            lines.append(f"| {title} | {lam} | {NOT_MEASURED} |" + " |" * (len(heading) - 3))
            continue
        metrics = row["metrics"]
        values = [
            title,
            lam,
            f"{row['fd']:.3f} ± {row['fd_std']:.3f}",
            _seeds(row),
            _number(row["held_out_loss"], ".5f"),
            f"{row['gmacs'] * 1e3:.2f}",
            _number(row["ratio"], ".4f"),
            _number(row["trajectory_ratio"], ".4f"),
            _time_ratio(row),
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
        "What is blank was not measured. Held-out loss: of denoising at all timesteps alike, mean over seeds. MMACs: of a forward, as "
        "executed while sampling, routers included. Times: "
        f"{_timed(rows)}. KID, precision and recall: to 10,000 of the training images.",
        "",
    ]
    return lines


def _by_loss(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same comparison by what training minimises, which the Fréchet distance does not follow."""
    losses = {
        (row["family"], row["lambda"], row["arm"]): row["held_out_loss"]
        for row in rows
        if not row["variant"] and row.get("held_out_loss") is not None
    }
    found = []
    for family in FAMILIES:
        control = losses.get((family, 1.0, "static-control"))
        for ratio in sorted({ratio for other, ratio, _ in losses if other == family}, reverse=True):
            dynamic = losses.get((family, ratio, "dynamic"))
            pruned = [(losses[key], TITLES[arm]) for arm in PRUNED if (key := (family, ratio, arm)) in losses]
            if control is None or dynamic is None or not pruned:
                continue
            best, title = min(pruned)
            found.append(
                f"- {FAMILIES[family]}, λ {ratio:g}: dynamic {dynamic / control - 1:+.1%}, {title} {best / control - 1:+.1%}"
            )
    if not found:
        return []
    return [
        "By what training minimises, the held-out loss, over the control's (the best pruning by that loss):",
        "",
        *found,
        "",
    ]


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)


def _bases(bases: Mapping[str, str]) -> str:
    return ", ".join(f"{FAMILIES[family]} `{base}`" for family, base in bases.items())


def _rates(rows: Sequence[Mapping[str, Any]]) -> str:
    """The learning rates of the rows that have run, the commonest without its rows."""
    found: dict[float, list[str]] = {}
    for row in rows:
        if row.get("learning_rate") is not None:
            arms = found.setdefault(row["learning_rate"], [])
            arms += [] if (title := TITLES.get(row["arm"], row["arm"])) in arms else [title]
    if not found:
        return ""
    common = max(found, key=lambda rate: len(found[rate]))
    others = [f"{rate:g} ({', '.join(arms)})" for rate, arms in found.items() if rate != common]
    return ": " + ", ".join([f"{common:g}", *others])


def _warning(family: str, base: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of a base that stopped before it had converged; nothing where no row stands on it."""
    if not any(row["family"] == family and row["state"] != NOT_MEASURED for row in rows):
        return []
    return [
        f"> {FAMILIES[family]}: every row starts from `{base}`, which was not trained until it gained little any more, so that more "
        "training alone flatters all of them.",
        "",
    ]


def _seeds(row: Mapping[str, Any]) -> str:
    done, planned = len(row["seeds"]), row["seeds_planned"]
    return str(done) if done >= planned else f"{done} of {planned}"


def _time_ratio(row: Mapping[str, Any]) -> str:
    if row["time_ratio"] is None:
        return ""
    timing = row["timing"]
    if timing is None or row["arm"] == "static-control":
        return f"{row['time_ratio']:.3f}"
    return f"{row['time_ratio']:.3f} [{timing['low']:.3f}, {timing['high']:.3f}]"


def _timed(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the times of a table were measured."""
    timing = next((row["timing"] for row in rows if row.get("timing") is not None), None)
    if timing is None:
        return "not measured"
    return (
        f"median of {timing['pairs']} paired ratios to the control, with its 95 % interval, in batches of {timing['batch']} on "
        f"{timing['device']}; ms an image are that ratio times the control's"
    )


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
            for part in (FAMILIES[row["family"]], row["arm"], f"{row['lambda']:g}", row["variant"])
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


def read_results(file: Path) -> dict[str, Any]:
    """What `write_report` wrote."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
