"""What a program is called with: tensors by name, and which of their sizes may change from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.prompt_condition import PromptCondition
from dydit_cli.families.resolution import ResizableGeometry
from dydit_cli.families.text_condition import TextCondition

SAMPLE = "sample"
LEAST_TEXT = 2
"""Tokens of a prompt. Of one alone, all image tokens skipped, a block would be left with a single row, which torch traces apart."""

Axes = dict[int, Any]
"""Axis -> the size's symbol."""


def tensors_of(condition: Any, has_labels: bool) -> dict[str, Tensor]:
    """The tensors of a family's condition, by name.

    Args:
        condition: Labels, or what a family with text takes.
        has_labels: Whether the model has classes; one without is told nothing.
    """
    if isinstance(condition, TextCondition):
        parts = {
            "prompt_embeds": condition.prompt_embeds,
            "pooled": condition.pooled,
            "guidance": condition.guidance,
            "extra": condition.extra,
        }
        return {name: part for name, part in parts.items() if part is not None}
    if isinstance(condition, PromptCondition):
        prompts = condition.prompt_embeds
        mask = condition.mask
        if mask is None:
            mask = torch.ones(prompts.shape[:2], dtype=torch.bool, device=prompts.device)
        return {"prompt_embeds": prompts, "prompt_mask": mask}
    return {"class_labels": condition} if has_labels else {}


def changing_sizes(model: DynamicModel, tensors: Mapping[str, Tensor]) -> dict[str, Axes]:
    """Of the sample and the tensors of a condition, the axes whose sizes are symbols.

    The batch always is, the length of a prompt where there is one, and height and width where the family takes any.
    """
    batch, text = Dim("batch", min=1), Dim("text_tokens", min=LEAST_TEXT)
    axes: dict[str, Axes] = {name: {0: batch} for name in (SAMPLE, *tensors)}
    for name in ("prompt_embeds", "prompt_mask"):
        if name in tensors:
            axes[name][1] = text
    if isinstance(model.geometry, ResizableGeometry):
        # 2x2 latent pixels make a token.
        sides = {2: 2 * Dim("token_rows", min=1), 3: 2 * Dim("token_columns", min=1)}
        for name in (SAMPLE, "extra"):
            if name in axes:
                axes[name] |= sides
    return axes
