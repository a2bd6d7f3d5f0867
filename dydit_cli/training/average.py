"""The exponential moving average of the weights, routers included: what is evaluated, sampled and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.text_condition import Condition
from dydit_cli.training.method import shared_tensors
from dydit_cli.training.step import Denoiser

Sharding = Callable[[DynamicModel], Denoiser]
"""Spreads a model over the processes and returns the root that its forwards go through."""


class MovingAverage:
    """A copy of a model that follows it slowly. Of weights below adapters, which do not change, there is one for both.

    Args:
        model: The model that trains; the copy starts at its weights.
        decay: Of the long run; the first steps use less, (1 + i) / (10 + i) at step i, so that the start is
            soon forgotten.
        sharding: Spreads the copy as the model itself, if that is spread.
    """

    def __init__(self, model: DynamicModel, decay: float, sharding: Sharding | None = None) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model, shared_tensors(model)).eval().requires_grad_(False)
        self._root: Denoiser | None = None
        if sharding is not None:
            self._root = sharding(self.model)
        else:
            # Gathers tokens and slices weights, so that evaluation and sampling cost what the user will pay.
            self.model.set_execution("compact")

    def denoise(
        self, noisy: Tensor, t: Tensor, condition: Condition, gating: Gating | None = None
    ) -> tuple[Tensor, Routing]:
        """Predict at evaluation: the prediction and the masks of every block. Parts of weights cannot be sliced, and run densely.

        Args:
            noisy: (B, C, h, w).
            t: (B,).
            condition: Of the B samples.
            gating: Thresholds with the model's ``keep_bias`` by default.
        """
        gating = gating or ThresholdGating(self.model.keep_bias)
        if self._root is None:
            return self.model.denoise(noisy, t, condition, gating=gating)
        ((prediction, routing),) = self._root(noisy, t, condition, [("dense", gating)])
        return prediction, routing

    def decay_at(self, step: int) -> float:
        """The decay of the (0-based) ``step``."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: DynamicModel, step: int) -> None:
        """Move every parameter towards the model's after the (0-based) ``step``."""
        weight = 1 - self.decay_at(step)
        for average, value in zip(self.model.parameters(), model.parameters(), strict=True):
            if average is not value:
                average.lerp_(value, weight)
