"""What step caching, int8 weights and torch.compile add to a static and to a dynamic model, alone and together.

    python scripts/measure_composition.py runs/demo-dit --json composing.json --write docs/composing.md

RUN is a folder of `dydit demo`, which is made if it is not there: its static control, fine-tuned as long as the dynamic model, and its
export. Every row is a run of diffusers' stock `DiTPipeline`. Time: whole runs, interleaved in an order that turns every round;
processor time, one thread; the median over rounds of the ratio to the static model within a round, with a 95 % bootstrap interval.
Quality: the Fréchet distance of images from the same seeds to Fashion-MNIST by the shipped network, and the PSNR to the same
model without additions. Weights: those of the transformer, and what compact execution packs beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

# Threads are set before torch is imported, so that its libraries see them.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dydit_cli.cli.chatter import hush

hush()

import numpy as np
import torch
from diffusers import DiTPipeline
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.utils import logging

from dydit_cli import load_model
from dydit_cli.evaluation.evaluate import evaluate
from dydit_cli.evaluation.settings import EvaluationSettings
from dydit_cli.execution import CompactExecutor
from dydit_cli.execution.quantised import parts_of_tensor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.profiling.timing import interleaved, paired_ratio
from dydit_cli.sampling.generate import generate
from scripts.pages import replace_between

BEGIN, END = "<!-- composing -->", "<!-- /composing -->"
STEPS, GUIDANCE, CLASSES = 25, 1.5, 10
CACHE, INT8, COMPILED = "first-block cache", "int8 weights", "compiled"
ADDITIONS = (CACHE, INT8, COMPILED)
TOGETHER = tuple(chosen for count in range(len(ADDITIONS) + 1) for chosen in combinations(ADDITIONS, count))
STATIC, DYNAMIC = "static", "dynamic"


@dataclass(frozen=True)
class Row:
    """A model and what is added to it."""

    model: str
    additions: tuple[str, ...]

    @property
    def name(self) -> str:
        """For progress and files."""
        return ", ".join((self.model, *self.additions))


@dataclass(frozen=True)
class Found:
    """What was measured of a row.

    Attributes:
        executed: Share of the MACs of attention and MLPs on its own way.
        seconds: Median of the processor time an image.
        time_ratio: To the static model without additions, with its 95 % interval.
        weight_bytes: Of parameters and buffers.
        packed_bytes: Beside them, in compact execution.
        frechet: With its 95 % interval.
        psnr: To the same model without additions, in dB, with its 95 % interval; None for that.
    """

    executed: float
    seconds: float
    time_ratio: tuple[float, float, float]
    weight_bytes: int
    packed_bytes: int
    frechet: tuple[float, float, float]
    psnr: tuple[float, float, float] | None


def in_int8(module: torch.nn.Module, name: str) -> bool:
    """Linear layers but those of routers, whose decisions are small and made in fp32."""
    return isinstance(module, torch.nn.Linear) and "_router" not in name


def pipeline_of(folder: Path, row: Row, threshold: float) -> DiTPipeline:
    """The stock pipeline of a row."""
    static = row.model == STATIC
    transformer = load_model(
        folder / "static" if static else folder / "export",
        execution="static" if static else "compact",
        compile=COMPILED in row.additions,
    )
    if INT8 in row.additions:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(transformer, Int8WeightOnlyConfig(), in_int8)
    if CACHE in row.additions:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    pipeline = DiTPipeline.from_pretrained(folder / "export", transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: DiTPipeline, images: int, seed: int, steps: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(B, h, w, C) bytes of one run; classes in turn."""
    found = pipeline(
        class_labels=[image % CLASSES for image in range(images)],
        guidance_scale=GUIDANCE,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return np.round(255 * found).astype(np.uint8)


def bytes_of(model: DynamicModel) -> tuple[int, int]:
    """Of parameters and buffers, and what is packed beside them."""
    tensors = [part for tensor in (*model.parameters(), *model.buffers()) for part in parts_of_tensor(tensor)]
    executor = model._executor
    packed = executor.packed_bytes if isinstance(executor, CompactExecutor) else 0
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors), packed


def file_name(row: Row, options: argparse.Namespace) -> str:
    """Of a row's images: of other settings they are others."""
    name = row.name.replace(", ", "+").replace(" ", "-")
    threshold = f"-{options.threshold:g}" if CACHE in row.additions else ""
    return f"{name}{threshold}-{options.images}-{options.steps}.npz"


def images_of(pipeline: DiTPipeline, file: Path, options: argparse.Namespace) -> Path:
    """Draw the images of a row into an archive, unless they are there."""
    if not file.exists():
        batches = [
            drawn(pipeline, min(options.quality_batch, options.images - first), first, options.steps)
            for first in range(0, options.images, options.quality_batch)
        ]
        labels = np.concatenate([np.arange(len(batch)) % CLASSES for batch in batches])
        partial_file = file.with_suffix(".part.npz")
        np.savez(partial_file, np.concatenate(batches), labels)
        partial_file.rename(file)
    return file


def quality(file: Path, base: Path | None) -> tuple[tuple[float, float, float], ...]:
    """Distance of an archive, and PSNR to another."""
    settings = EvaluationSettings(against=None if base is None else str(base), yardstick_images=0)
    report = evaluate(file, settings).report
    values: list[Any] = [report.metrics["frechet"]]
    if report.pairs is not None:
        values.append(report.pairs.measures["psnr"].mean)
    return tuple((value.value, value.low, value.high) for value in values)


def executed(model: DynamicModel, options: argparse.Namespace) -> float:
    """Share of the MACs of attention and MLPs that a run of our own sampler executes, which counts it."""
    batches = list(
        generate(
            model,
            num_images=options.batch,
            batch_size=options.batch,
            steps=options.steps,
            guidance=GUIDANCE,
            sampler="ddim",
        )
    )
    return float(torch.cat([batch.ratios for batch in batches]).mean())


def measured(options: argparse.Namespace, say: Callable[[str], None]) -> dict[Row, Found]:
    """All rows."""
    rows = [Row(model, additions) for model in (STATIC, DYNAMIC) for additions in TOGETHER]
    pipelines = {row: pipeline_of(options.run, row, options.threshold) for row in rows}
    runs: dict[str, Callable[[], object]] = {
        row.name: partial(drawn, pipeline, options.batch, 0, options.steps)
        for row, pipeline in pipelines.items()
    }
    say("time ")
    seconds = interleaved(runs, options.rounds, time.process_time, warmups=2, on_run=partial(say, "."))
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Row, Found] = {}
    say("\nquality ")
    files: dict[Row, Path] = {}
    for row in rows:
        model = pipelines[row].transformer
        weights, packed = bytes_of(model)
        files[row] = images_of(pipelines[row], folder / file_name(row, options), options)
        scores = quality(files[row], files[Row(row.model, ())] if row.additions else None)
        ratio = paired_ratio(seconds[row.name], seconds[STATIC])
        found[row] = Found(
            executed(model, options),
            median(seconds[row.name]) / options.batch,
            (ratio.ratio, ratio.low, ratio.high),
            weights,
            packed,
            scores[0],
            scores[1] if len(scores) > 1 else None,
        )
        say(".")
    say("\n")
    return found


def interval(values: Sequence[float], digits: int) -> str:
    """A value and its interval."""
    value, low, high = (f"{part:.{digits}f}" for part in values)
    return f"{value} ({low}–{high})"


def table(found: dict[Row, Found]) -> str:
    """Markdown."""
    headings = [
        "model",
        "with",
        "executed",
        "ms an image",
        "time of static",
        "weights, MiB",
        "Fréchet",
        "PSNR, dB",
    ]
    lines = [f"| {' | '.join(headings)} |", f"| --- | --- |{' ---: |' * (len(headings) - 2)}"]
    for row, values in found.items():
        packed = f" + {values.packed_bytes / 2**20:.2f}" if values.packed_bytes else ""
        cells = [
            row.model,
            ", ".join(row.additions) or "nothing",
            f"{values.executed:.3f}",
            f"{1000 * values.seconds:.1f}",
            interval(values.time_ratio, 3),
            f"{values.weight_bytes / 2**20:.2f}{packed}",
            interval(values.frechet, 2),
            "–" if values.psnr is None else interval(values.psnr, 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of `dydit demo`; made if it is not there")
    parser.add_argument("--threshold", type=float, default=0.06, help="of the first-block cache")
    parser.add_argument("--images", type=int, default=1000, help="images a row")
    parser.add_argument("--quality-batch", type=int, default=50, help="of these, images of a pipeline call")
    parser.add_argument("--batch", type=int, default=16, help="images of a timed run")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it runs")
    parser.add_argument(
        "--keep", type=Path, help="folder for the images; those that are there are not drawn again"
    )
    parser.add_argument("--json", type=Path, help="file for all values")
    parser.add_argument("--write", type=Path, help="page whose table is to be replaced")
    options = parser.parse_args()
    if options.quick:
        options.images, options.batch, options.rounds, options.steps = 20, 4, 2, 10
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    # It remarks on every class that is not its own.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not (options.run / "export").is_dir():
        subprocess.run([sys.executable, "-m", "dydit_cli", "demo", "--out", str(options.run)], check=True)
    found = measured(options, partial(print, end="", file=sys.stderr, flush=True))
    asked = f"--threshold {options.threshold:g} --images {options.images} --batch {options.batch} --rounds {options.rounds}"
    text = (
        f"{table(found)}\n\n`python scripts/measure_composition.py RUN {asked}`, {options.steps} steps, torch "
        f"{torch.__version__}, {platform.machine()}, one thread."
    )
    print(text)
    if options.json is not None:
        values = [{"model": row.model, "with": row.additions, **asdict(each)} for row, each in found.items()]
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        replace_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
