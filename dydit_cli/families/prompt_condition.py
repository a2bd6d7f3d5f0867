"""What a text-to-video model is conditioned on, sample by sample: where other families have a tensor of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptCondition:
    """The prompts of B samples, as a text encoder gives them.

    Attributes:
        prompt_embeds: (B, L, D).
        mask: (B, L), or (B, F, L) with one for every frame: bool, true for the tokens to attend to, or numbers that are added to
            the attention scores. None attends to all.
    """

    prompt_embeds: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> PromptCondition:
        """The prompts of some samples: a tensor or list of indices, or a slice."""
        index = rows if isinstance(rows, slice | Tensor) else torch.as_tensor(rows, dtype=torch.long)
        return PromptCondition(self.prompt_embeds[index], None if self.mask is None else self.mask[index])

    def to(self, device: torch.device | str) -> PromptCondition:
        """The same prompts on a device."""
        return PromptCondition(
            self.prompt_embeds.to(device), None if self.mask is None else self.mask.to(device)
        )
