"""Train the shipped DiT and SiT further, with the project's own `finetune`: python scripts/train_base_models.py dit --data FOLDER

    FOLDER: the four original IDX files of Fashion-MNIST.

The shipped models stopped after some 5,500 steps, short of convergence: any further training improves them, and would pass for a merit of
whatever else was done to them. The tables of docs/protocol.md therefore stand on these: 30,000 steps of 64 further, static (target
ratio 1). `finetune` has a constant learning rate; the rate falls from phase to phase, each a run of its own that goes on from the averaged
weights of the one before. A run that was stopped goes on with the same command. `--install` puts the finished model beside the original.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from dydit_cli.artifacts import artifact_folder, atomic_write, load_model, save_model, write_json
from dydit_cli.checkpoints.builtin import FOLDER, builtin_models
from dydit_cli.conversion.convert import convert
from dydit_cli.conversion.insertion import is_ours
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import prepare

BATCH_SIZE = 64
SEED = 0


@dataclass(frozen=True)
class Phase:
    """A run of `finetune`: its steps, its learning rate, and the decay of its average."""

    steps: int
    learning_rate: float
    ema_decay: float


PHASES: tuple[Phase, ...] = (
    Phase(14_000, 6e-4, 0.9995),
    Phase(8_000, 3e-4, 0.9995),
    Phase(5_000, 1e-4, 0.999),
    Phase(3_000, 3e-5, 0.999),
)


def train(
    model: Path, out: Path, data: str, phase: Phase, precision: str, every: int, compiled: bool
) -> Path:
    """Run or resume one phase; returns the folder with the averaged weights, and what it reached beside them."""
    average = out / "average"
    if average.exists():
        return average
    settings = FinetuneSection.model_validate(
        {
            "model": str(model),
            "data": data,
            "out": out,
            "steps": phase.steps,
            "target_ratio": 1,
            "batch_size": BATCH_SIZE,
            # Each phase sees the images in an order of its own.
            "seed": SEED + int(out.name.removeprefix("phase")),
            "learning_rate": phase.learning_rate,
            "max_grad_norm": 1.0,
            "mixed_precision": precision,
            "ema_decay": phase.ema_decay,
            "evaluate_every": 0,
            "checkpoint_every": every,
            "resume": (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir()),
            "overwrite": out.exists() and not any((out / "checkpoints").glob("*")),
        }
    )
    run = prepare(settings)
    if compiled:
        # Its averaged copy, which is measured, stays as it is.
        for block in run.model.dynamic_blocks:
            block.compile(dynamic=False)
    started, first = time.monotonic(), run.done
    for report in run.steps():
        if report.step % 100 == 0 or report.step == phase.steps:
            pace = (time.monotonic() - started) / max(1, report.step - first)
            left = pace * (phase.steps - report.step) / 60
            print(
                f"{out.name} {report.step}/{phase.steps}: loss {report.loss:.4f}, {BATCH_SIZE / pace:.0f} images/s, "
                f"{left:.0f} min left in this phase",
                flush=True,
            )
    result = run.finish()
    print(f"{out.name}: held-out loss {result.held_out_loss:.5f}", flush=True)
    with artifact_folder(average) as folder:
        save_model(run.average.model, folder)
        write_json(folder / "reached.json", {"held_out_loss": result.held_out_loss})
    return average


def static_half(folder: Path) -> dict[str, Tensor]:
    """The averaged weights without routers, in half precision: half of the megabytes for rounding of one in 2,000."""
    state = load_model(folder, execution="static").state_dict()
    return {key: tensor.half().contiguous() for key, tensor in state.items() if not is_ours(key)}


def install(written: Path, name: str, facts: dict[str, Any]) -> None:
    """Put a model beside the shipped ones, and what is known of it into their file of facts."""
    with atomic_write(FOLDER / f"{name}.pt") as temporary:
        temporary.write_bytes(written.read_bytes())
    file = FOLDER / "models.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    known[f"{name}.pt"] = facts
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items()]
    with atomic_write(file) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on training, and write ``FAMILY_fmnist_long.pt``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("dit", "sit"))
    parser.add_argument("--data", required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, help="where the phases are kept (runs/base-FAMILY)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="of the forward pass")
    parser.add_argument("--phases", help="steps:rate:decay,... instead of the built-in ones")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: a sixth faster here")
    parser.add_argument("--install", action="store_true", help="put the result beside the shipped models")
    options = parser.parse_args(arguments)
    phases = PHASES
    if options.phases:
        parts = [part.split(":") for part in options.phases.split(",")]
        phases = tuple(Phase(int(steps), float(rate), float(decay)) for steps, rate, decay in parts)
    base, name = f"{options.family}_fmnist", f"{options.family}_fmnist_long"
    out: Path = options.out or Path("runs") / f"base-{options.family}"
    out.mkdir(parents=True, exist_ok=True)
    previous = out / "converted"
    if not previous.exists():
        convert(f"builtin:{base}", out=previous)
    for number, phase in enumerate(phases, 1):
        previous = train(
            previous,
            out / f"phase{number}",
            options.data,
            phase,
            options.precision,
            options.checkpoint_every,
            options.compile,
        )
    written = out / f"{name}.pt"
    with atomic_write(written) as temporary:
        torch.save({"ema": static_half(previous)}, temporary)
    reached = json.loads((previous / "reached.json").read_text(encoding="utf-8"))
    before = builtin_models()[base]
    facts = {
        "family": options.family,
        "trained_with": f"scripts/train_base_models.py (dydit finetune, target ratio 1), from {base}",
        "steps": sum(phase.steps for phase in phases),
        "batch_size": BATCH_SIZE,
        "phases": ", ".join(f"{phase.steps} steps at {phase.learning_rate:g}" for phase in phases),
        "precision": options.precision,
        "config": before["config"],
        "data": "Fashion-MNIST training images; mirrored at random except classes 5, 7 and 9",
        "weights": "EMA under 'ema', fp16",
        "held_out_loss": round(reached["held_out_loss"], 5),
        "sha256": hashlib.sha256(written.read_bytes()).hexdigest(),
    }
    print(json.dumps(facts, indent=1, ensure_ascii=False))
    if options.install:
        install(written, name, facts)


if __name__ == "__main__":
    main()
