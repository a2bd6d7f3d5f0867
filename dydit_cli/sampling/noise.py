"""The noise of a sampling run: image i's numbers depend on (seed, i) and the step alone.

Hence an image is the same whether it is made alone, in a batch of 64, or by the third of eight processes, and a run of 50,000
images can be cut into parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.randomness import generator


@dataclass(frozen=True)
class ImageNoise:
    """The noise of the images of one batch. Everything is drawn on the CPU in fp32, so that all devices and dtypes start alike.

    Attributes:
        seed: Seed of the run.
        indices: Global indices of the images.
        shape: Of one image, video or latent.
        device: Where the numbers are needed.
    """

    seed: int
    indices: tuple[int, ...]
    shape: tuple[int, ...]
    device: torch.device

    def start(self) -> Tensor:
        """The pure noise that sampling starts from, (B, C, h, w)."""
        return self._draw([generator(self.seed, "start", index) for index in self.indices])

    def generators(self, step: int) -> list[torch.Generator]:
        """A fresh generator an image for ``step``, as diffusers' schedulers take them."""
        return [generator(self.seed, "step", step, index) for index in self.indices]

    def step(self, step: int) -> Tensor:
        """The noise of ``step``, (B, C, h, w); the numbers that a scheduler draws from `generators`."""
        return self._draw(self.generators(step))

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=each) for each in generators]).to(self.device)
