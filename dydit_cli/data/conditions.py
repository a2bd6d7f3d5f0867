"""What the samples of a source are conditioned on: their labels, or their texts where the source has texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from dydit_cli.data.source import Source, Subset
from dydit_cli.families.text_condition import Condition, TextCondition


@runtime_checkable
class TextSource(Protocol):
    """A source of samples with texts; its labels number the distinct texts."""

    def conditions(self, indices: Sequence[int]) -> TextCondition:
        """The texts of some samples, as the text encoders gave them."""
        ...


def conditions_of(source: Source, indices: Sequence[int]) -> Condition:
    """The conditions of the samples with ``indices``, on the CPU."""
    if isinstance(source, Subset):
        return conditions_of(source.source, source.indices[list(indices)].tolist())
    if isinstance(source, TextSource):
        return source.conditions(indices)
    return source.labels[torch.as_tensor(indices, dtype=torch.long)]
