"""What a calibrated start is worth: how good it is untrained, and how fine-tuning goes on from it.

    python scripts/measure_start.py runs/start --table docs/calibrate.md --figure docs/images/calibrated_start.png

Each shipped model converted at the paper's start, calibrated to 0.8, and calibrated to 0.5; then all three fine-tuned to 0.5 by the
demo's recipe with the same seed, without routing noise after the ramp; the paper's start with it as well. Conversions that are there
are not made again, and a run that was stopped goes on. The curves are written beside the figure as CSV.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

# Threads are set before torch is imported, so that its libraries see them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import dydit_cli
from dydit_cli.artifacts import load_model
from dydit_cli.data import open_data
from dydit_cli.objectives import HeldOutDraws, RatioReport, measure, objective_of
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import prepare
from scripts.pages import replace_between

DATA = "fashion-mnist-subset"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
STARTS = {
    "paper": "the paper's start and noise",
    "paper-annealed": "the paper's start",
    "calibrated-0.8": "calibrated to 0.8",
    "calibrated-0.5": "calibrated to 0.5",
}
RATIOS = {"paper": None, "paper-annealed": None, "calibrated-0.8": 0.8, "calibrated-0.5": 0.5}
COLOURS = {
    "paper": "#c9d0d6",
    "paper-annealed": "#6b7884",
    "calibrated-0.8": "#2c7c94",
    "calibrated-0.5": "#b0763f",
}
TITLES = {"dit": "DiT", "sit": "SiT"}
COLUMNS = ("family", "start", "step", "ratio", "held_out_loss")


def converted(out: Path, family: str, ratio: float | None) -> Path:
    """The folder of a conversion, made if it is not there: at the paper's start, or calibrated to a ratio."""
    folder = out / f"{family}-{'paper' if ratio is None else f'calibrated-{ratio:g}'}"
    if not (folder / "manifest.json").exists():
        calibration = {} if ratio is None else {"calibrate": DATA, "calibrate_ratio": ratio}
        dydit_cli.convert(f"builtin:{family}_fmnist", out=folder, **calibration)
    return folder


def held_out(folder: Path, execution: str, images: int) -> RatioReport:
    """What a model realises without training."""
    model = load_model(folder, execution=execution)
    source = open_data(DATA, geometry=model.geometry).held_out
    return measure(model, HeldOutDraws(source, objective_of(model), images))


def trained(
    out: Path, family: str, start: str, model: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The evaluations of a fine-tuning run, its start included; trains as far as is missing."""
    folder = out / f"{family}-{start}-trained"
    overrides = {
        "model": model,
        "out": folder,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "mixed_precision": options.precision,
        "evaluate_every": options.every,
        "evaluate_images": options.images,
        "checkpoint_every": options.every,
        "resume": (folder / "checkpoints").exists(),
        "overwrite": folder.exists() and not (folder / "checkpoints").exists(),
    }
    if start != "paper":
        # Noise would flip an eighth of the units of a model whose logits are about 2.
        overrides |= {"gating": "annealed", "anneal_steps": 0}
    recipe = load_recipe(
        f"demo/fashion-mnist-{family}", [f"finetune.{key}={value}" for key, value in overrides.items()]
    )
    if not options.plot_only:
        section = recipe.sections["finetune"]
        if not isinstance(section, FinetuneSection):
            raise TypeError("the recipe has no finetune section")
        run = prepare(section, recipe=recipe)
        for report in run.steps():
            if report.ema_loss is not None:
                print(
                    f"{family} {start} {report.step}: {report.ema_loss:.5f} at {report.ema_ratio:.4f}",
                    flush=True,
                )
        run.finish()
    first = held_out(model, "compact", options.images)
    rows = [row_of(family, start, 0, first.ratio, first.losses["loss"])]
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("ema_loss") is not None:
            rows.append(row_of(family, start, record["step"], record["ema_ratio"], record["ema_loss"]))
    return rows


def row_of(family: str, start: str, step: int, ratio: float, loss: float) -> dict[str, Any]:
    """A row of the CSV."""
    return dict(zip(COLUMNS, (family, start, step, round(ratio, 5), round(loss, 6)), strict=True))


def untrained_table(out: Path, families: list[str]) -> str:
    """Markdown: held-out loss without any training."""
    lines = [
        "| | static | calibrated to 0.8: ratio | loss | calibrated to 0.5: ratio | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family in families:
        static = held_out(converted(out, family, None), "static", 1000).losses["loss"]
        cells = [TITLES[family], f"{static:.5f}"]
        for ratio in (0.8, 0.5):
            found = held_out(converted(out, family, ratio), "compact", 1000)
            loss = found.losses["loss"]
            cells += [f"{found.ratio:.4f}", f"{loss:.5f} ({loss / static - 1:+.1%})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves_table(rows: list[dict[str, Any]], families: list[str]) -> str:
    """Markdown: the evaluations, a table for each family with its starts side by side."""
    by_place = {(row["family"], row["start"], row["step"]): row for row in rows}
    tables = []
    for family in families:
        own = [row for row in rows if row["family"] == family]
        starts = [start for start in STARTS if any(row["start"] == start for row in own)]
        head = "".join(f" {STARTS[start]}: ratio | loss |" for start in starts)
        lines = [f"| {TITLES[family]}, step |{head}", f"| ---: |{' ---: | ---: |' * len(starts)}"]
        for step in sorted({row["step"] for row in own}):
            cells = [str(step)]
            for start in starts:
                row = by_place.get((family, start, step))
                cells += ["", ""] if row is None else [f"{row['ratio']:.3f}", f"{row['held_out_loss']:.5f}"]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def draw(path: Path, rows: list[dict[str, Any]], families: list[str]) -> None:
    """Loss and ratio over steps, a column for each family."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(families), 5.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(families), squeeze=False, sharex="col", height_ratios=(3, 2))
    for column, family in enumerate(families):
        loss, ratio = axes[0][column], axes[1][column]
        for start, title in STARTS.items():
            points = [row for row in rows if (row["family"], row["start"]) == (family, start)]
            if not points:
                continue
            steps = [row["step"] for row in points]
            style = {"color": COLOURS[start], "label": title, "marker": "o", "markersize": 3}
            loss.plot(steps, [row["held_out_loss"] for row in points], **style)
            ratio.plot(steps, [row["ratio"] for row in points], **style)
        loss.set_title(TITLES[family], loc="left")
        ratio.axhline(0.5, color="#b04a3f", linewidth=0.8, linestyle=":")
        ratio.set_xlabel("fine-tuning steps")
        for panel in (loss, ratio):
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
    axes[0][0].set_ylabel("held-out loss")
    axes[1][0].set_ylabel("share of MACs executed")
    axes[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--family", choices=tuple(TITLES), action="append", help="both by default")
    parser.add_argument("--start", choices=tuple(STARTS), action="append", help="all by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--images", type=int, default=250, help="held-out images of an evaluation")
    parser.add_argument(
        "--plot-only", action="store_true", help="train nothing, draw the runs that are there"
    )
    parser.add_argument("--figure", type=Path, help="PNG to write; the curves go beside it as CSV")
    parser.add_argument("--table", type=Path, help="page whose measured part is to be replaced")
    return parser.parse_args()


def main() -> None:
    """Measure, draw, print."""
    options = parse()
    families = options.family or list(TITLES)
    rows: list[dict[str, Any]] = []
    for family in families:
        for start in options.start or list(STARTS):
            if options.plot_only and not (options.out / f"{family}-{start}-trained").exists():
                continue
            rows += trained(
                options.out, family, start, converted(options.out, family, RATIOS[start]), options
            )
    text = "\n\n".join(
        [
            "Without training, on 1,000 held-out images:",
            untrained_table(options.out, families),
            f"Fine-tuned to 0.5, batches of {options.batch_size}, {options.precision}; moving average with thresholds on "
            f"{options.images} held-out images:",
            curves_table(rows, families),
            f"torch {torch.__version__}, {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), "
            f"{torch.get_num_threads()} thread(s); one seed.",
        ]
    )
    print(text)
    if options.figure is not None:
        draw(options.figure, rows, families)
        with options.figure.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.table is not None:
        replace_between(options.table, BEGIN, END, text)


if __name__ == "__main__":
    main()
