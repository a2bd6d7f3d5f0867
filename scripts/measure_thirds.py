"""Where along the way of sampling is quality lost? Parts of the steps by one model, the others by another.

    python scripts/measure_thirds.py runs/dynamic --beside runs/control --images 2000

The steps are cut into thirds from noise to image. In each row the models under test make the steps of one third, and the model beside
them (usually the static control) those of the other two; the first and last row are either model alone. Same noise in all rows. The
Fréchet distance is that of `dydit evaluate`, with its 95 % interval; packaged reference and network.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Threads are set before torch is imported, so that its libraries see them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from dydit_cli import load_model
from dydit_cli.evaluation.evaluate import evaluate
from dydit_cli.evaluation.settings import EvaluationSettings
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.registry import family_of
from dydit_cli.sampling.decoding import to_uint8
from dydit_cli.sampling.guidance import Guidance, GuidedField
from dydit_cli.sampling.noise import ImageNoise
from dydit_cli.sampling.samplers import sampler_for
from scripts.pages import replace_between

BEGIN, END = "<!-- thirds -->", "<!-- /thirds -->"
SAMPLERS = {"diffusion": "ddim", "flow": "euler"}
THIRDS = ("noisiest third", "middle third", "cleanest third")


@dataclass
class Spliced:
    """A `Field` that asks one of two fields, by how many steps it has made.

    Attributes:
        tested, beside: The fields.
        by_tested: Steps of ``tested``.
        done: Steps so far; the samplers used here make one evaluation a step.
    """

    tested: GuidedField
    beside: GuidedField
    by_tested: range
    done: int = 0

    @property
    def learned_sigma(self) -> bool:
        """See `Field`."""
        return self.tested.learned_sigma

    @property
    def dynamic(self) -> bool:
        """See `Field`."""
        return self.tested.dynamic

    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        """See `Field`."""
        chosen = self.tested if self.done in self.by_tested else self.beside
        self.done += 1
        return chosen(state, time)

    def frozen(self, time: Tensor) -> Spliced:
        """See `Field`; only adaptive solvers ask."""
        raise NotImplementedError


def samples_of(
    tested: DynamicTransformer, beside: DynamicTransformer, by_tested: range, options: argparse.Namespace
) -> np.ndarray:
    """(N, H, W, C) bytes: images of all classes in turn, image i from the noise of (seed, i)."""
    kind = family_of(tested).objective
    sampler = sampler_for(kind, SAMPLERS[kind])
    shape, made = tested.geometry.sample_shape, []
    for first in range(0, options.images, options.batch_size):
        indices = tuple(range(first, min(options.images, first + options.batch_size)))
        labels = torch.tensor([index % tested.geometry.num_classes for index in indices])
        fields = (GuidedField(model, labels, Guidance()) for model in (tested, beside))
        field = Spliced(*fields, by_tested)
        noise = ImageNoise(options.seed, indices, shape, tested.device)
        *_, last = sampler.integrate(field, noise.start(), options.steps, noise)
        made.append(to_uint8(last).numpy())
    return np.concatenate(made)


def distance(samples: np.ndarray, folder: Path) -> str:
    """As `dydit evaluate` has it."""
    file = folder / "samples.npz"
    np.savez(file, arr_0=samples)
    found = evaluate(file, EvaluationSettings()).report.metrics["frechet"]
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def opened(folder: Path) -> DynamicTransformer:
    """A model in compact execution, which is static where its routers keep everything, as those of a control and of pruned models do."""
    model = load_model(folder, convention="native")
    if not isinstance(model, DynamicTransformer):
        raise SystemExit(f"{folder} is no DiT or SiT")
    return model


def table(options: argparse.Namespace) -> str:
    """Markdown."""
    cuts = [round(options.steps * part / len(THIRDS)) for part in range(len(THIRDS) + 1)]
    parts = {name: range(*cuts[place : place + 2]) for place, name in enumerate(THIRDS)}
    parts |= {"all": range(options.steps)}
    beside = opened(options.beside)
    models = [opened(folder) for folder in options.models]
    lines = [
        f"| steps by the model | {' | '.join(options.names)} |",
        "| --- |" + " ---: |" * len(models),
    ]
    with tempfile.TemporaryDirectory() as kept:
        alone = distance(samples_of(beside, beside, range(0), options), Path(kept))
        lines.append(f"| none |{f' {alone} |' * len(models)}")
        for name, steps in parts.items():
            found = [distance(samples_of(model, beside, steps, options), Path(kept)) for model in models]
            lines.append(f"| {name} | {' | '.join(found)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", help="folders of DiT or SiT models under test")
    parser.add_argument("--names", nargs="+", help="their names in the table; those of the folders")
    parser.add_argument("--beside", type=Path, required=True, help="folder of what makes the other steps")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page whose table is to be replaced")
    options = parser.parse_args()
    options.names = options.names or [folder.name for folder in options.models]
    if len(options.names) != len(options.models):
        parser.error("--names has to name each model")
    return options


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    text = (
        f"{table(options)}\n\n`python scripts/measure_thirds.py MODEL --beside CONTROL --images {options.images}`, "
        f"{options.steps} steps, guidance 1, seed {options.seed}, torch {torch.__version__}, {platform.machine()}."
    )
    print(text)
    if options.write is not None:
        replace_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
