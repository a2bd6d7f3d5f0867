"""Ordered width against free masks: quality, and the time of sampling, of two models that were trained alike.

    python scripts/measure_ordered.py runs/free/trained runs/ordered/trained --frechet 500 --write docs/ratio.md

Quality: ratio and denoising loss on the same 1,000 held-out images; the Fréchet distance of samples from the same seeds. Time: whole
sampling runs with a plan, steps and guidance as in the demo, interleaved in an order that turns every round; processor time, one
thread; the median over rounds of the ratio within a round, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

# Threads are set before torch is imported, so that its libraries see them.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dydit_cli import load_model
from dydit_cli.data import open_data
from dydit_cli.evaluation.evaluate import evaluate
from dydit_cli.evaluation.inputs.model import SamplingSettings
from dydit_cli.evaluation.settings import EvaluationSettings
from dydit_cli.execution import CompactExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import HeldOutDraws, measure, objective_of
from dydit_cli.profiling.timing import interleaved, paired_ratio
from dydit_cli.sampling.generate import generate
from dydit_cli.sampling.samplers import sampler_for
from scripts.pages import replace_between

BEGIN, END = "<!-- ordered -->", "<!-- /ordered -->"
SAMPLER, STEPS, GUIDANCE = {"diffusion": "ddim", "flow": "euler"}, 25, 1.5


def quality(path: Path, options: argparse.Namespace) -> list[str]:
    """Ratio, loss and distance."""
    model = load_model(path, convention="native")
    objective = objective_of(model)
    held_out = open_data(options.data, geometry=model.geometry).held_out
    found = measure(model, HeldOutDraws(held_out, objective, options.images))
    cells = [f"{found.ratio:.4f}", f"{found.losses['loss']:.5f}"]
    if options.frechet:
        sampling = SamplingSettings(
            num_images=options.frechet, steps=STEPS, guidance=GUIDANCE, sampler=SAMPLER[objective.kind]
        )
        score = evaluate(str(path), EvaluationSettings(sampling=sampling)).report.metrics["frechet"]
        cells.append(f"{score.value:.2f} ({score.low:.2f}–{score.high:.2f})")
    return cells


def sampling_run(model: DynamicModel, batch: int) -> Callable[[], None]:
    """A function that draws ``batch`` images."""
    sampler = SAMPLER[objective_of(model).kind]

    def run() -> None:
        for _ in generate(
            model, num_images=batch, steps=STEPS, guidance=GUIDANCE, sampler=sampler, batch_size=batch
        ):
            pass

    return run


def planned(path: Path) -> list[str]:
    """What a plan of the schedule copies: layers by policy, and bytes."""
    model = load_model(path, convention="native")
    sampler = sampler_for(objective_of(model).kind, SAMPLER[objective_of(model).kind])
    if sampler.times is None:
        raise TypeError("a sampler on a fixed grid knows its times")
    plan = model.plan(sampler.times(STEPS))
    executor = model._executor
    if not isinstance(executor, CompactExecutor):
        raise TypeError("a plan belongs to compact execution")
    prefixes = dict(plan.policies).get("prefix", 0)
    return [f"{prefixes} of {sum(dict(plan.policies).values())}", f"{executor.copied_bytes:,}"]


def table(options: argparse.Namespace) -> str:
    """Markdown."""
    paths = {"free": options.free, "ordered": options.ordered}
    runs: dict[str, Callable[[], object]] = {
        name: sampling_run(load_model(path, convention="native"), options.batch)
        for name, path in paths.items()
    }
    count = partial(print, ".", end="", file=sys.stderr, flush=True)
    seconds = interleaved(runs, options.rounds, time.process_time, on_run=count)
    print(file=sys.stderr)
    headings = ["width", "ratio", "loss", *["Fréchet"] * bool(options.frechet)]
    headings += ["layers whose masks are prefixes", "bytes of weights that the plan copies"]
    headings += ["s of processor time an image", "of free"]
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join(['---', *['---:'] * (len(headings) - 1)])} |"]
    for name, path in paths.items():
        ratio = paired_ratio(seconds[name], seconds["free"])
        of_free = "–" if name == "free" else f"{ratio.ratio:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"
        cells = [name, *quality(path, options), *planned(path)]
        lines.append(f"| {' | '.join([*cells, f'{median(seconds[name]) / options.batch:.4f}', of_free])} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("free", type=Path, help="folder of a model with free masks")
    parser.add_argument("ordered", type=Path, help="folder of one with ordered width, trained alike")
    parser.add_argument("--data", default="fashion-mnist-subset")
    parser.add_argument("--images", type=int, default=1000, help="held-out images")
    parser.add_argument("--frechet", type=int, default=0, help="samples of a Fréchet distance")
    parser.add_argument("--batch", type=int, default=8, help="images of a sampling run")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", type=Path, help="page whose table is to be replaced")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    asked = f"--images {options.images} --frechet {options.frechet} --batch {options.batch} --rounds {options.rounds}"
    text = (
        f"{table(options)}\n\n`python scripts/measure_ordered.py FREE ORDERED {asked}`, torch {torch.__version__}, "
        f"{platform.machine()}, one thread."
    )
    print(text)
    if options.write is not None:
        replace_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
