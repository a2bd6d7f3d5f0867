"""The exponential moving average of the weights, routers included: what is evaluated, sampled and saved."""

from __future__ import annotations

import copy

import torch

from dydit_cli.families.dynamic_model import DynamicModel


class MovingAverage:
    """A copy of a model that follows it slowly.

    Args:
        model: The model that trains; the copy starts at its weights.
        decay: Of the long run; the first steps use less, (1 + i) / (10 + i) at step i, so that the start is
            soon forgotten.
    """

    def __init__(self, model: DynamicModel, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Gathers tokens and slices weights, so that evaluation and sampling cost what the user will pay.
        self.model.set_execution("compact")

    def decay_at(self, step: int) -> float:
        """The decay of the (0-based) ``step``."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: DynamicModel, step: int) -> None:
        """Move every parameter towards the model's after the (0-based) ``step``."""
        weight = 1 - self.decay_at(step)
        for average, value in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(value, weight)
