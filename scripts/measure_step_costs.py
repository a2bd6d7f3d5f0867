"""What does a training step cost besides the static model's: masks, the complete branch, a teacher?

    python scripts/measure_step_costs.py --preset dit-xl/2 --blocks 2 --batch 4   # blocks of a published size
    python scripts/measure_step_costs.py --model runs/demo-dit/converted --batch 64   # a converted model

Whole optimiser steps as `dydit finetune` makes them (draws, forward, backward, clipping, AdamW, moving average), on noise in place
of data. The sides run interleaved in an order that turns every round; times are of the processor, with one thread, and what is
printed is the median over rounds of the ratio to the static step of the same round, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Threads are set before torch is imported, so that its libraries see them.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dydit_cli.artifacts import load_for_training
from dydit_cli.benchmarking.subjects import fill
from dydit_cli.data import Batch
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import preset_named
from dydit_cli.profiling.timing import interleaved, paired_ratio
from dydit_cli.randomness import normal
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.parts import assemble
from dydit_cli.training.stepping import Stepper

SIDES = {
    "static": {"target_ratio": 1.0},
    "masks": {"target_ratio": 0.5},
    "masks and complete branch": {"target_ratio": 0.5, "complete_branch_steps": 10**9},
    "masks and teacher": {"target_ratio": 0.5, "loss": "distillation"},
}


def model_of(options: argparse.Namespace) -> DynamicModel:
    """A converted model, or some blocks of a published size with random weights."""
    if options.model is not None:
        return load_for_training(options.model, torch.device("cpu"))
    family, config = preset_named(options.preset)
    model = family.build(config | {"num_layers": options.blocks})
    fill(model, seed=0)
    for block in model.dynamic_blocks:
        block.reset_routers()
    return model.train()


def step_of(model: DynamicModel, options: argparse.Namespace, **changes: object) -> Callable[[], None]:
    """A function that makes the next step of a run of its own."""
    settings = FinetuneSection(
        model="none",
        data="none",
        out="none",
        steps=10**9,
        batch_size=options.batch,
        full_width_steps=0,
        ramp_steps=1,
        mixed_precision=options.precision,
        **changes,
    )
    stepper = Stepper(settings, assemble(settings, copy.deepcopy(model), torch.device("cpu")))
    geometry, done = model.geometry, 0
    clean = normal(0, (options.batch, *geometry.sample_shape), "clean")
    batch = Batch(
        clean, torch.arange(options.batch) % max(1, geometry.num_classes), tuple(range(options.batch))
    )

    def step() -> None:
        nonlocal done
        stepper.step(batch, done, 0.0)
        done += 1

    return step


def measured(options: argparse.Namespace) -> str:
    """The table."""
    model = model_of(options)
    steps = {name: step_of(model, options, **changes) for name, changes in SIDES.items()}
    count = partial(print, ".", end="", file=sys.stderr, flush=True)
    seconds = interleaved(steps, options.rounds, time.process_time, warmups=2, on_run=count)
    print(file=sys.stderr)
    masks, both = seconds["masks"], seconds["masks and complete branch"]
    for every in (4, 10):
        seconds[f"masks, complete branch every {every} steps"] = [
            ((every - 1) * one + two) / every for one, two in zip(masks, both, strict=True)
        ]
    rows = [
        "| step | s of processor time | of a static step | 95 % interval |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, values in seconds.items():
        ratio = paired_ratio(values, seconds["static"])
        rows.append(
            f"| {name} | {sorted(values)[len(values) // 2]:.3f} | {ratio.ratio:.3f} | {ratio.low:.3f}–{ratio.high:.3f} |"
        )
    return "\n".join(rows)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", type=Path, help="folder of a converted model")
    subject.add_argument("--preset", help="a published size, with random weights")
    parser.add_argument("--blocks", type=int, default=2, help="of the published size")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    print(measured(options))
    print(
        f"\n`python {' '.join(Path(word).as_posix() for word in sys.argv)}`, torch {torch.__version__}, {platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), one thread, {options.rounds} rounds."
    )


if __name__ == "__main__":
    main()
