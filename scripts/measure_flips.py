"""How often does a decision differ between batch sizes, executions and types of numbers, and what does that do to the picture?

    python scripts/measure_flips.py runs/demo-dit/dynamic                            # prints a table
    python scripts/measure_flips.py runs/demo-dit/dynamic --write docs/decisions.md  # and puts it there

The reference is compact execution in fp32 of each image alone: what `dydit sample --deterministic` makes. Each variant is compared
with it twice. *At the same states*: the variant is shown what the reference saw at each step, and its decisions are compared one
by one. *On its own way*: the variant samples from the same noise, and the finished pictures are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads are set before torch is imported, so that its libraries see them.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import dydit_cli
from dydit_cli.dynamic.routing import Routing
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.registry import family_of
from dydit_cli.sampling.decoding import to_uint8
from dydit_cli.sampling.generate import generate
from dydit_cli.sampling.guidance import Guidance, GuidedField
from dydit_cli.sampling.samplers import sampler_for
from scripts.pages import replace_between

BEGIN, END = "<!-- flips -->", "<!-- /flips -->"
LEVELS = 255


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    execution: str
    dtype: str
    batch: int

    def words(self) -> str:
        """For the table."""
        images = "alone" if self.batch == 1 else f"{self.batch} at once"
        return f"{self.execution}, {self.dtype.replace('float', 'fp').replace('bfp', 'bf')}, {images}"


REFERENCE = Variant("compact", "float32", 1)
VARIANTS = (
    Variant("compact", "float32", 8),
    Variant("compact", "float32", 32),
    Variant("dense", "float32", 1),
    Variant("dense", "float32", 32),
    Variant("compact", "bfloat16", 1),
    Variant("compact", "bfloat16", 32),
)


@dataclass
class Seen:
    """What a model was shown and decided at one step: states (B, C, h, w), masks and logits by row."""

    states: Tensor
    time: float
    routing: Routing
    logits: Tensor


@dataclass
class Recorder:
    """Stands in for a model in a sampler, and remembers the decisions of each forward."""

    model: DynamicTransformer
    branches: int
    seen: list[Seen] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the model's."""
        return getattr(self.model, name)

    def denoise(
        self, states: Tensor, times: Tensor | float, labels: Tensor, **options: Any
    ) -> tuple[Tensor, Routing]:
        """As the model, and remember."""
        logits: list[Tensor] = []
        with hooked(self.model, logits):
            prediction, routing = self.model.denoise(states, times, labels, **options)
        rows = len(states) // self.branches
        self.seen.append(
            Seen(
                states[:rows].clone(),
                float(torch.as_tensor(times).flatten()[0]),
                routing.cpu(),
                torch.stack(logits, dim=1).cpu(),
            )
        )
        return prediction, routing


@contextmanager
def hooked(model: DynamicTransformer, logits: list[Tensor]) -> Iterator[None]:
    """Collect the (B, N) logits of every block's token router."""
    hooks = [
        block.token_router.register_forward_hook(lambda module, inputs, output: logits.append(output))
        for block in model.dynamic_blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Flips:
    """Decisions that differ from the reference's, of how many; and how near to zero the reference's logits were there."""

    tokens: int = 0
    of_tokens: int = 0
    widths: int = 0
    of_widths: int = 0
    largest_logit: float = 0.0
    forwards: int = 0
    of_forwards: int = 0


@dataclass
class Pictures:
    """A variant's images, and the processor time of each."""

    samples: Tensor
    seconds: float


def opened(path: Path, variant: Variant) -> DynamicTransformer:
    """The model as a variant runs it."""
    return dydit_cli.load_model(
        path,
        execution=variant.execution,
        torch_dtype=getattr(torch, variant.dtype),
    )


def sampled(model: Any, variant: Variant, options: argparse.Namespace) -> Pictures:
    """All images, on the variant's own way."""
    started = time.process_time()
    batches = [
        batch.samples
        for batch in generate(
            model,
            num_images=options.images,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            batch_size=variant.batch,
            deterministic=variant == REFERENCE,
        )
    ]
    return Pictures(torch.cat(batches), (time.process_time() - started) / options.images)


def compared(
    model: DynamicTransformer, variant: Variant, reference: list[list[Seen]], options: argparse.Namespace
) -> Flips:
    """Show the variant what the reference saw: ``reference`` is [image][step]."""
    guidance = Guidance(options.guidance)
    sampler = sampler_for(family_of(model).objective)
    if variant.execution == "compact" and sampler.times is not None:
        model.plan(sampler.times(options.steps))
    flips = Flips()
    for first in range(0, len(reference), variant.batch):
        images = reference[first : first + variant.batch]
        labels = torch.tensor([(first + place) % model.geometry.num_classes for place in range(len(images))])
        for step in range(len(images[0])):
            before = [image[step] for image in images]
            recorder = Recorder(model, guidance.branches)
            GuidedField(recorder, labels, guidance)(  # type: ignore[arg-type]
                torch.cat([seen.states for seen in before]), torch.tensor(before[0].time)
            )
            (now,) = recorder.seen
            for place, then in enumerate(before):
                rows = [place + branch * len(images) for branch in range(guidance.branches)]
                count(flips, then, now, rows)
    return flips


def count(flips: Flips, then: Seen, now: Seen, rows: list[int]) -> None:
    """Add one image's decisions at one step."""
    differs = then.routing.tokens.bool() != now.routing.tokens[rows].bool()
    flips.tokens += int(differs.sum())
    flips.of_tokens += differs.numel()
    flips.forwards += int(differs.any())
    flips.of_forwards += 1
    if differs.any():
        flips.largest_logit = max(flips.largest_logit, float(then.logits[differs].abs().max()))
    for mine, theirs in (
        (then.routing.heads, now.routing.heads[rows]),
        (then.routing.groups, now.routing.groups[rows]),
    ):
        flips.widths += int((mine != theirs).sum())
        flips.of_widths += mine.numel()


def line(variant: Variant, flips: Flips, reference: Pictures, made: Pictures) -> list[str]:
    """A row of the table."""
    # Pictures are in [-1, 1]; differences are given in the 255 levels of a PNG file.
    difference = (made.samples.clamp(-1, 1) - reference.samples.clamp(-1, 1)).abs().flatten(1) * LEVELS / 2
    psnr = 10 * torch.log10(LEVELS**2 / difference.square().mean(dim=1))
    exact = int((made.samples == reference.samples).flatten(1).all(dim=1).sum())
    files = int((to_uint8(made.samples) == to_uint8(reference.samples)).flatten(1).all(dim=1).sum())
    return [
        variant.words(),
        f"{flips.tokens:,} of {flips.of_tokens:,} ({rate(flips.tokens, flips.of_tokens)})",
        f"{flips.forwards / flips.of_forwards:.1%}",
        f"{flips.largest_logit:.1e}" if flips.tokens else "–",
        f"{flips.widths:,} of {flips.of_widths:,}",
        f"{exact} / {files} of {len(difference)}",
        f"{float(difference.max()):.3g}",
        f"{float(difference.mean()):.2g}",
        f"{decibels(float(psnr.median()))} / {decibels(float(psnr.min()))}",
        f"{made.seconds:.3f}",
    ]


def decibels(value: float) -> str:
    """A PSNR; that of equal pictures is infinite."""
    return "∞" if value == float("inf") else f"{value:.0f}"


def rate(part: int, whole: int) -> str:
    """A share, readable where it is tiny."""
    return "0" if part == 0 else f"{part / whole:.1e}"


HEADINGS = [
    "against compact, fp32, alone",
    "token decisions that differ, at the same states",
    "steps with one",
    "largest logit there",
    "width decisions",
    "equal pictures, bits / PNG",
    "largest difference (of 255)",
    "mean",
    "PSNR, median / worst (dB)",
    "CPU s an image",
]


def plain(variant: Variant, options: argparse.Namespace) -> list[str]:
    """A row on what the type of numbers does where nothing is decided: the static model against the static model in fp32."""
    exact = Variant(variant.execution, "float32", variant.batch)
    made, reference = (sampled(opened(options.model, each), each, options) for each in (variant, exact))
    cells = line(variant, Flips(of_tokens=1, of_forwards=1), reference, made)
    cells[0] += " (against static, fp32)"
    cells[1:5] = ["–"] * 4
    return cells


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a fine-tuned model that makes pixels")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page whose table is to be replaced")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    branches = Guidance(options.guidance).branches
    recorder = Recorder(opened(options.model, REFERENCE), branches)
    made = sampled(recorder, REFERENCE, options)
    # Each image was made alone, so that its forwards follow one another.
    per_image = len(recorder.seen) // options.images
    seen = [recorder.seen[first : first + per_image] for first in range(0, len(recorder.seen), per_image)]
    again = sampled(opened(options.model, REFERENCE), REFERENCE, options)
    rows = [line(REFERENCE, Flips(of_tokens=1, of_forwards=1), made, again)]
    rows[0][1:5] = ["–"] * 4
    rows[0][0] = "the same once more"
    for variant in VARIANTS:
        model = opened(options.model, variant)
        flips = compared(model, variant, seen, options)
        rows.append(line(variant, flips, made, sampled(opened(options.model, variant), variant, options)))
        print(f"{variant.words()}: {rows[-1]}", file=sys.stderr)
    rows.append(plain(Variant("static", "bfloat16", 32), options))
    ratio = sum(
        batch.ratios.sum()
        for batch in generate(opened(options.model, REFERENCE), num_images=8, steps=options.steps)
    )
    asked = f"--images {options.images} --steps {options.steps} --guidance {options.guidance:g} --seed {options.seed}"
    text = (
        f"{table(rows)}\n\n"
        f"`python scripts/measure_flips.py MODEL {asked}`, torch {torch.__version__}, {platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), one thread; a model whose trajectories execute {float(ratio) / 8:.3f} of "
        f"the static attention and MLP MACs."
    )
    print(text)
    if options.write is not None:
        replace_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
