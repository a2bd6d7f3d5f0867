"""Prepared latents with texts, for text-to-image models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dydit_cli.data.cache import CachedTexts, TextShape
from dydit_cli.data.cached import CachedSource
from dydit_cli.data.source import SampleGeometry
from dydit_cli.errors import DyditError
from dydit_cli.families.text_condition import TextCondition

GUIDANCE = 3.5
"""Strength at evaluation, of models that take one: the default of FLUX.1-dev's pipeline."""


@runtime_checkable
class TextGeometry(SampleGeometry, Protocol):
    """What data must know of a text-to-image model."""

    @property
    def joint_size(self) -> int:
        """Width of the sequence of text embeddings."""
        ...

    @property
    def pooled_size(self) -> int:
        """Width of the pooled text embedding."""
        ...

    @property
    def guidance(self) -> bool:
        """Whether the model takes the strength of guidance as an input."""
        ...


class CachedTextSource(CachedSource):
    """Prepared latents with texts as a source; its labels number the distinct texts.

    Args:
        folder: The cache.
        geometry: The model's input, to which latents and texts must belong.

    Raises:
        DyditError: for a damaged cache, or one that does not fit the model.
    """

    def __init__(self, folder: Path, geometry: TextGeometry) -> None:
        super().__init__(folder, geometry)
        self._texts = CachedTexts(folder, self.index)
        self._guidance = GUIDANCE if geometry.guidance else None

    def conditions(self, indices: Sequence[int]) -> TextCondition:
        """See `TextSource`."""
        return self._texts.conditions(self.labels[list(indices)].tolist(), self._guidance)

    @property
    def prompts(self) -> list[str]:
        """The distinct texts."""
        return self._texts.prompts

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        text = self.index.text
        return {
            **super().describe(),
            "kind": "cached latents and texts",
            "texts": sum(shard.texts for shard in self.index.texts),
            "text_tokens": text.tokens if text is not None else 0,
        }

    def _checked_labels(self, geometry: SampleGeometry) -> Tensor:
        if self.index.text is None:
            raise DyditError(
                f"The cache in {self.folder} holds class labels, the model takes texts.",
                why="It was prepared for a class-conditional model.",
                fix="Prepare the images with --pipeline FOLDER, whose text encoders read their captions.",
            )
        if isinstance(geometry, TextGeometry):
            check_text(self.index.text, geometry, self.folder)
        return self._latents.numbers


def check_text(text: TextShape, geometry: TextGeometry, where: Path) -> None:
    """See that embeddings are those that a model takes.

    Raises:
        DyditError: if they are another encoder's.
    """
    given, wanted = (text.width, text.pooled), (geometry.joint_size, geometry.pooled_size)
    if given != wanted:
        raise DyditError(
            f"The texts of {where} do not fit the model.",
            why=f"Their embeddings have widths of {given[0]} and {given[1]} (pooled); the model takes {wanted[0]} and {wanted[1]}.",
            fix="Use the text encoders of the pipeline that the model belongs to.",
        )
