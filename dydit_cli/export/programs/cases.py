"""Calls of a program whose right answers the model gave: what an export is compared with before the command says done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dydit_cli.dynamic.gates import FrozenWidthGating, Gating, ThresholdGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.export.programs.inputs import SAMPLE, tensors_of
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.prompt_condition import PromptCondition
from dydit_cli.families.registry import family_of
from dydit_cli.families.resolution import ResizableGeometry
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.randomness import normal

ATTEMPTS = 8
MARGIN = 1e-4
"""Least distance of a logit from zero in a good case. Two orders of summation differ by 1e-6 of a logit; one that lies nearer to
zero may fall on either side, and then whole tokens differ with nothing being wrong."""

BATCHES = (1, 3)
NOISE_LEVELS = {
    "diffusion": (900.0, 500.0, 100.0),
    "flow": (0.1, 0.5, 0.9),
    "rectified-flow": (0.9, 0.5, 0.1),
}
SIDES = {1: (8, 8), 3: (4, 12)}
"""By batch, latent pixels of the samples of a family that takes any size: small ones."""
PROMPTS = {1: 6, 3: 7}
"""By batch, tokens of the prompts."""
GUIDANCE = 3.5


@dataclass(frozen=True)
class Case:
    """A call and its answer.

    Attributes:
        inputs: Tensors by name.
        expected: The model's prediction.
    """

    inputs: dict[str, Tensor]
    expected: Tensor


@dataclass
class Margins:
    """Decides as another gating does, and notes how near to zero a logit came.

    Attributes:
        live: Decides.
        least: Smallest distance so far.
    """

    live: Gating
    least: float = field(default=float("inf"))

    def _noted(self, logits: Tensor) -> Tensor:
        if logits.numel():
            self.least = min(self.least, float(logits.abs().min()))
        return logits

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.heads(block, self._noted(logits))

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.groups(block, self._noted(logits))

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.context_groups(block, self._noted(logits))

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.tokens(block, self._noted(logits))


@dataclass(frozen=True)
class Attempt:
    """A call that may become a case.

    Attributes:
        timestep: Of the model.
        told: What the program is told instead.
        gating: Of the model.
        seed: Of the inputs.
    """

    timestep: float
    told: dict[str, Tensor]
    gating: Gating
    seed: int


def live_cases(model: DynamicModel) -> list[Case]:
    """Cases of a program that is told timesteps; the model runs compactly and is not changed."""
    objective = family_of(model).objective
    scale = 1000.0 if objective == "diffusion" else 1.0
    gating = ThresholdGating(model.keep_bias)
    found = []
    for level in NOISE_LEVELS[objective]:
        for batch in BATCHES:
            times = [level - 0.007 * scale * number for number in range(ATTEMPTS)]
            attempts = [
                Attempt(time, {"timestep": torch.tensor(time)}, gating, seed)
                for seed, time in enumerate(times)
            ]
            found.append(best_case(model, batch, attempts))
    return found


def baked_cases(model: DynamicModel, timesteps: Sequence[float], widths: Routing) -> list[Case]:
    """Cases of a program of a schedule, at its first step, one in the middle and its last.

    Args:
        model: Runs compactly and is not changed.
        timesteps: Of the schedule, in the family's own convention.
        widths: Of each, which the program has as data.
    """
    last = len(timesteps) - 1
    live = ThresholdGating(model.keep_bias)
    found = []
    for step in dict.fromkeys((0, last // 2, last)):
        for batch in BATCHES:
            gating = FrozenWidthGating(row_of(widths, step, batch), live)
            told = {"step": torch.tensor(step)}
            attempts = [Attempt(timesteps[step], told, gating, seed) for seed in range(ATTEMPTS)]
            found.append(best_case(model, batch, attempts))
    return found


def row_of(widths: Routing, step: int, batch: int) -> Routing:
    """The widths of one step for a batch."""
    return widths.map(lambda mask: mask[step : step + 1].expand(batch, -1))


@torch.no_grad()
def best_case(model: DynamicModel, batch: int, attempts: Iterable[Attempt]) -> Case:
    """The first call in which no decision is close, or else the one in which the closest is farthest."""
    best: tuple[float, Case] | None = None
    for attempt in attempts:
        sample, condition = drawn(model, batch, attempt.seed)
        gating = Margins(attempt.gating)
        expected, _ = model.denoise(sample, attempt.timestep, condition, gating=gating)
        if best is None or gating.least > best[0]:
            tensors = tensors_of(condition, has_labels=model.geometry.num_classes > 0)
            best = gating.least, Case({SAMPLE: sample, **attempt.told, **tensors}, expected)
        if gating.least > MARGIN:
            break
    if best is None:
        raise ValueError("no attempts")
    return best[1]


def drawn(model: DynamicModel, batch: int, seed: int) -> tuple[Tensor, Any]:
    """Noise and conditions for a batch; small samples and short prompts where the family takes any."""
    geometry = model.geometry
    shape = geometry.sample_shape
    if isinstance(geometry, ResizableGeometry):
        shape = (shape[0], *SIDES[batch])
    sample = normal(seed, (batch, *shape), "program")
    if geometry.num_classes:
        # The null class among them.
        return sample, (torch.arange(batch) * 3 + seed) % (geometry.num_classes + 1)
    _, condition = model.example_inputs(1, 0)
    if isinstance(condition, PromptCondition):
        length = PROMPTS[batch]
        prompts = normal(seed, (batch, length, condition.prompt_embeds.shape[2]), "program_prompt")
        lengths = length - torch.arange(batch) % (length - 1)
        return sample, PromptCondition(prompts, torch.arange(length) < lengths[:, None])
    if isinstance(condition, TextCondition):
        embeds, pooled, extra = condition.prompt_embeds, condition.pooled, condition.extra
        return sample, TextCondition(
            normal(seed, (batch, PROMPTS[batch], embeds.shape[2]), "program_prompt"),
            normal(seed, (batch, pooled.shape[1]), "program_pooled"),
            None if condition.guidance is None else GUIDANCE + torch.arange(batch, dtype=torch.float32),
            None if extra is None else normal(seed, (batch, extra.shape[1], *shape[1:]), "program_extra"),
        )
    return sample, model.null_condition(batch)
