"""What a text-to-image model is told beside the noisy sample: embeddings of the prompt, a guidance scale, further latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """The conditions of B samples. Code that knows nothing of text treats it like a (B,) tensor of labels.

    Attributes:
        prompt_embeds: (B, T, D) embeddings of the prompt's tokens.
        pooled: (B, P) embedding of the prompt as a whole.
        guidance: (B,) guidance scales, for models that were distilled to take one.
        extra: (B, E, h, w) latents that are packed beside the sample (the mask and the masked image of FLUX Fill).
    """

    prompt_embeds: Tensor
    pooled: Tensor
    guidance: Tensor | None = None
    extra: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.prompt_embeds)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Self:
        """Some samples: by their numbers, a mask or a slice."""
        chosen = rows if isinstance(rows, Tensor | slice) else torch.as_tensor(rows, dtype=torch.long)
        return self._map(lambda part: part[chosen])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """On another device, or in another floating-point type."""
        return self._map(lambda part: part.to(device=device, dtype=dtype))

    @classmethod
    def cat(cls, conditions: Sequence[Self]) -> Self:
        """The samples of several, one after the other; all must have the same parts and lengths of prompt."""
        parts: dict[str, Any] = {}
        for field in fields(cls):
            held = [getattr(condition, field.name) for condition in conditions]
            parts[field.name] = None if held[0] is None else torch.cat(held)
        return cls(**parts)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        parts: dict[str, Any] = {
            name: None if part is None else function(part) for name, part in held.items()
        }
        return type(self)(**parts)


Condition = Tensor | TextCondition
"""Of B samples: (B,) class labels, or texts."""
