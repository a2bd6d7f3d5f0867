"""A dynamic model as a module of tensors alone, fit for `torch.export`: how it is called, and who decides its widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution.interface import BlockWidth, RoutedBlock
from dydit_cli.export.programs.executor import ProgramExecutor
from dydit_cli.export.programs.weights import move_weights
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.prompt_condition import PromptCondition
from dydit_cli.families.text_condition import TextCondition


class LiveProgram(nn.Module):
    """One denoising step whose width routers decide, at any timestep.

    A subclass for each kind of condition names its inputs, because tracing wants them by name.

    Args:
        model: Without budgets (`settle_budget`); it is taken apart and of no other use afterwards.
    """

    def __init__(self, model: DynamicModel) -> None:
        super().__init__()
        self.model = model
        self._executor = ProgramExecutor(move_weights(model.dynamic_blocks))

    def predict(self, sample: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        """The prediction for (B, *sample_shape) samples at one timestep, a number without axes in the family's own convention."""
        gating = ThresholdGating(self.model.keep_bias)
        prediction, _ = self.model.denoise(
            sample, timestep, condition, executor=self._executor, gating=gating
        )
        return prediction


class UnconditionalProgram(LiveProgram):
    """Of a model that is told nothing."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Predict; see `LiveProgram.predict`."""
        return self.predict(sample, timestep, self.model.null_condition(sample.shape[0]))


class LabelledProgram(LiveProgram):
    """Of a model of classes."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict; ``class_labels`` are (B,) integers."""
        return self.predict(sample, timestep, class_labels)


class PromptProgram(LiveProgram):
    """Of a text-to-video model."""

    def forward(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """Predict; see `PromptCondition`."""
        return self.predict(sample, timestep, PromptCondition(prompt_embeds, prompt_mask))


class TextProgram(LiveProgram):
    """Of a text-to-image model."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Predict; see `TextCondition`."""
        return self.predict(sample, timestep, TextCondition(prompt_embeds, pooled, guidance, extra))


def live_program(model: DynamicModel) -> LiveProgram:
    """The program of a model, by what it is told. The model is taken apart; see `LiveProgram`."""
    condition = model.null_condition(1)
    if isinstance(condition, TextCondition):
        return TextProgram(model)
    if isinstance(condition, PromptCondition):
        return PromptProgram(model)
    return LabelledProgram(model) if model.geometry.num_classes else UnconditionalProgram(model)


class BakedProgram(nn.Module):
    """One denoising step of a schedule whose widths and timestep embeddings are data; for DiT and SiT.

    Args:
        model: As for `LiveProgram`. Its width routers and its timestep embedder are dropped.
        timesteps: (S,) of the schedule, in the family's own convention.
        widths: Of each of them; see `DynamicModel.routing`.
    """

    embeddings: Tensor
    heads: Tensor
    groups: Tensor

    def __init__(self, model: DynamicModel, timesteps: Tensor, widths: Routing) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            embeddings = model.embed_time(timesteps)
        # (S, L, H) and (S, L, G).
        self.register_buffer("heads", widths.heads > 0)
        self.register_buffer("groups", widths.groups > 0)
        self._weights = move_weights(model.dynamic_blocks)
        for block in model.dynamic_blocks:
            for name in ("head_router", "channel_router"):
                # A pruned block has none.
                if hasattr(block, name):
                    delattr(block, name)
        # Called with the number of the step, in the place of a timestep.
        model.t_embedder = nn.Embedding.from_pretrained(embeddings)

    def forward(self, sample: Tensor, step: Tensor, class_labels: Tensor) -> Tensor:
        """Predict.

        Args:
            sample: (B, *sample_shape), noisy.
            step: The number of the step in the schedule, an integer without axes.
            class_labels: (B,) integers.
        """
        row = step.reshape(1)
        heads, groups = (table.index_select(0, row) for table in (self.heads, self.groups))

        def written(blocks: Sequence[RoutedBlock], time: Tensor, gating: Gating) -> list[BlockWidth]:
            return [BlockWidth(heads[:, index], groups[:, index]) for index in range(len(blocks))]

        executor = ProgramExecutor(self._weights, written)
        gating = ThresholdGating(self.model.keep_bias)
        prediction, _ = self.model.denoise(sample, step, class_labels, executor=executor, gating=gating)
        return prediction
