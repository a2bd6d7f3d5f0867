"""Random samples as a data source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dydit_cli.data.source import Draw
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.families.dynamic_model import DynamicModel


class RandomSource:
    """Samples in [-1, 1] whose labels go round the classes."""

    def __init__(self, geometry: Geometry, samples: int) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (samples, *geometry.sample_shape)
        self._samples = torch.rand(shape, generator=generator) * 2 - 1
        self.labels = torch.arange(samples) % max(1, geometry.num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return str(index)

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        return self._samples[list(indices)]

    def sample(self, index: int) -> tuple[Tensor, int]:
        return self._samples[index], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        return {"kind": "images", "samples": len(self)}


class PromptedSource(RandomSource):
    """The same for a model that reads prompts."""

    def __init__(self, model: DynamicModel, samples: int) -> None:
        super().__init__(model.geometry, samples)
        _, self._prompts = model.example_inputs(samples, seed=3)

    def conditions(self, indices: Sequence[int]) -> Any:
        return self._prompts[list(indices)]


def source_for(model: DynamicModel, samples: int) -> RandomSource:
    """Random samples with what a model is conditioned on."""
    labelled = model.geometry.num_classes > 0
    return RandomSource(model.geometry, samples) if labelled else PromptedSource(model, samples)
