"""The teacher of self-distillation: the model as it was before training, with everything on.

A guidance-distilled model learned from another model's guided predictions, not from data. Data alone would unteach it the guidance;
its own complete predictions do not, at any strength of guidance, and need no picture either. The copy is frozen: the model that
trains shares its weights with its complete form, which therefore drifts.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.text_condition import Condition


class Teacher(Protocol):
    """What a step can match instead of the data's own targets."""

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, h, w) noisy samples at (B,) timesteps -> (B, C_out, h, w) without gradient."""
        ...


class FrozenTeacher:
    """A copy of a model in static execution.

    Args:
        model: As it is before its first step.
        shares_weights: Whether its weights will not change, so that they are held once. Its routers may: none is asked.
    """

    def __init__(self, model: DynamicModel, shares_weights: bool = False) -> None:
        tensors = (*model.parameters(), *model.buffers()) if shares_weights else ()
        self._model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
        if not shares_weights:
            self._model.requires_grad_(False)
        self._executor = model.make_executor("static")

    @torch.no_grad()
    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Teacher`."""
        prediction, _ = self._model.denoise(
            noisy, t, condition, executor=self._executor, gating=CompleteGating()
        )
        return prediction
