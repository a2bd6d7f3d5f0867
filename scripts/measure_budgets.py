"""Does a model follow its budgets, and is that better than turning the dial of a model that was trained for one ratio?

    python scripts/measure_budgets.py runs/budgets/trained --plain runs/budgets/plain --separate 0.3=runs/budgets/at-0.3 \\
        --write docs/budgets.md

On the same held-out images, noise and timesteps, with thresholds and averaged weights: the ratio that each budget realises and the
denoising loss; the loss of the plain model whose ``keep_bias`` is turned until it executes as much; and that of models trained for
the ratio alone. With ``--frechet N`` also the Fréchet distance of N samples, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

# Threads are set before torch is imported, so that its libraries see them.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dydit_cli import load_model
from dydit_cli.data import open_data
from dydit_cli.evaluation.evaluate import evaluate
from dydit_cli.evaluation.inputs.model import SamplingSettings
from dydit_cli.evaluation.settings import EvaluationSettings
from dydit_cli.objectives import HeldOutDraws, measure, objective_of
from dydit_cli.training.budgets import nearest
from scripts.pages import replace_between

BEGIN, END = "<!-- budgets -->", "<!-- /budgets -->"
SAMPLER, STEPS, GUIDANCE = {"diffusion": "ddim", "flow": "euler"}, 25, 1.5


@dataclass(frozen=True)
class Point:
    """What a model does at one place.

    Attributes:
        ratio: Realised on the held-out images.
        loss: Denoising loss on the same.
        frechet: Its distance and the 95 % interval, if asked for.
    """

    ratio: float
    loss: float
    frechet: str = ""


class Measured:
    """A model on the held-out images.

    Args:
        path: Its folder.
        options: Of the command line.
    """

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path, self.options = path, options
        self.model = load_model(path, convention="native")
        self.objective = objective_of(self.model)
        data = open_data(options.data, geometry=self.model.geometry)
        self.draws = HeldOutDraws(data.held_out, self.objective, options.images)

    def at_budget(self, budget: float) -> Point:
        """Told a budget, as `dydit sample --budget` tells it."""
        found = measure(self.model.set_budget(budget), self.draws)
        return Point(found.ratio, found.losses["loss"], self._frechet(budget=budget))

    def as_it_is(self) -> Point:
        """Without being told anything."""
        found = measure(self.model, self.draws)
        return Point(found.ratio, found.losses["loss"], self._frechet())

    def at_dial(self, ratio: float) -> tuple[float, Point]:
        """With the dial turned until it executes ``ratio``; the dial's position comes first."""
        found = nearest(
            lambda dial: measure(self.model.set_keep_bias(dial), self.draws).ratio,
            ratio,
            self.model.keep_bias,
        )
        report = measure(self.model.set_keep_bias(found.shift), self.draws)
        return found.shift, Point(report.ratio, report.losses["loss"], self._frechet(keep_bias=found.shift))

    def _frechet(self, **place: float) -> str:
        """Of samples at a budget or a position of the dial."""
        if not self.options.frechet:
            return ""
        sampling = SamplingSettings(
            num_images=self.options.frechet,
            steps=STEPS,
            guidance=GUIDANCE,
            sampler=SAMPLER[self.objective.kind],
            **place,  # type: ignore[arg-type]
        )
        score = evaluate(str(self.path), EvaluationSettings(sampling=sampling)).report.metrics["frechet"]
        return f"{score.value:.2f} ({score.low:.2f}–{score.high:.2f})"


def table(options: argparse.Namespace) -> str:
    """Markdown."""
    budgeted = Measured(options.model, options)
    plain = Measured(options.plain, options) if options.plain else None
    alone = dict(options.separate)
    quality = "loss" + (", Fréchet" if options.frechet else "")
    headings = ["budget", "realised", quality, f"dial: {quality} at the same ratio", "its keep_bias"]
    headings += [f"trained for it alone: ratio, {quality}"] * bool(alone)
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join(['---:'] * len(headings))} |"]
    for budget in options.at:
        point = budgeted.at_budget(budget)
        cells = [f"{budget:g}", f"{point.ratio:.4f}", words(point), "–", "–"]
        if plain is not None:
            dial, turned = plain.at_dial(point.ratio)
            cells[3:] = [words(turned), f"{dial:.2f}"]
        if alone:
            path = alone.get(budget)
            found = Measured(path, options).as_it_is() if path else None
            cells.append("–" if found is None else f"{found.ratio:.4f}, {words(found)}")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def words(point: Point) -> str:
    """Loss, and distance if there is one."""
    return f"{point.loss:.5f}" + (f", {point.frechet}" if point.frechet else "")


def pair(text: str) -> tuple[float, Path]:
    """``0.3=FOLDER``."""
    ratio, _, folder = text.partition("=")
    return float(ratio), Path(folder)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a model that was trained with budgets")
    parser.add_argument("--plain", type=Path, help="folder of one that was trained for one ratio")
    parser.add_argument(
        "--separate",
        type=pair,
        nargs="*",
        default=[],
        metavar="RATIO=FOLDER",
        help="models trained for these",
    )
    parser.add_argument("--at", type=float, nargs="+", default=[0.3, 0.45, 0.6, 0.8], help="budgets")
    parser.add_argument("--data", default="fashion-mnist-subset")
    parser.add_argument("--images", type=int, default=1000, help="held-out images")
    parser.add_argument("--frechet", type=int, default=0, help="samples of a Fréchet distance")
    parser.add_argument("--write", type=Path, help="page whose table is to be replaced")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    asked = f"--images {options.images}" + (f" --frechet {options.frechet}" if options.frechet else "")
    others = " --plain PLAIN" * bool(options.plain) + " --separate RATIO=FOLDER" * bool(options.separate)
    text = (
        f"{table(options)}\n\n`python scripts/measure_budgets.py MODEL{others} {asked}`, "
        f"torch {torch.__version__}, {platform.machine()}."
    )
    print(text)
    if options.write is not None:
        replace_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
