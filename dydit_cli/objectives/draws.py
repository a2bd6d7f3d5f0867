"""Held-out samples with their timesteps and noise: the same for every model that is measured.

The images are spread over the timesteps, 20 at each of 50, instead of meeting every one (ours: 1,000 forward
passes instead of 50,000, for a standard error that is a small part of the tolerance that targets are held to;
``per_image`` goes up to the whole product). The images of a timestep share batches, so that compact execution
has one width a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.data.buckets import same_shape
from dydit_cli.data.conditions import conditions_of
from dydit_cli.data.source import Source
from dydit_cli.families.text_condition import Condition
from dydit_cli.objectives.objective import Objective
from dydit_cli.processes.world import ALONE, World
from dydit_cli.randomness import generator, normal

IMAGES = 1000
TIMESTEPS = 50
BATCH_SIZE = 256


@dataclass(frozen=True)
class HeldOutBatch:
    """Held-out samples of one timestep and one shape with the noise that is mixed in.

    Attributes:
        clean: (B, C, h, w).
        condition: (B,) class labels, or texts.
        noise: (B, C, h, w).
        t: (B,).
        stands_in: Whether another process has these samples already, and they are here so that every process has a batch.
    """

    clean: Tensor
    condition: Condition
    noise: Tensor
    t: Tensor
    stands_in: bool = False


@dataclass(frozen=True)
class HeldOutDraws:
    """Which held-out sample is noised when and how: the same for every model that is measured with the same
    numbers.

    Attributes:
        source: Held-out samples.
        objective: Of the model's family; gives the timesteps.
        images: Samples to use, at most.
        timesteps: How many, evenly spaced.
        per_image: At how many of them each sample is seen, at least; more where there are fewer samples than timesteps, so that
            every timestep is seen.
        batch_size: Samples of one batch, at most.
        seed: Of the choice of samples and of the noise.
    """

    source: Source
    objective: Objective
    images: int = IMAGES
    timesteps: int = TIMESTEPS
    per_image: int = 1
    batch_size: int = BATCH_SIZE
    seed: int = 0

    @property
    def samples(self) -> int:
        """How many samples are used."""
        return min(self.images, len(self.source))

    @property
    def turns(self) -> int:
        """At how many timesteps each sample is seen."""
        needed = -(-self.timesteps // max(1, self.samples))
        return min(self.timesteps, max(self.per_image, needed))

    def batches(self, device: torch.device | str, world: World = ALONE) -> Iterator[HeldOutBatch]:
        """The samples in the order of t, each batch of one timestep; of several processes, each has its part of every batch."""
        order = torch.randperm(len(self.source), generator=generator(self.seed, "held_out_order"))
        chosen = order[: self.images].tolist()
        for level, t in enumerate(self.objective.grid(self.timesteps).tolist()):
            members = [index for position, index in enumerate(chosen) if self._meets(position, level)]
            for part in same_shape(self.source, members):
                for start in range(0, len(part), self.batch_size):
                    together = part[start : start + self.batch_size]
                    own = list(world.share(together))
                    yield self._batch(own or together[:1], level, t, device, stands_in=not own)

    def _meets(self, position: int, level: int) -> bool:
        """Whether the sample at ``position`` of the order is seen at timestep number ``level``.

        It is seen at ``turns`` evenly spaced levels, beginning with its position: every level gets its
        share of the samples.
        """
        levels = (
            (position + turn * self.timesteps // self.turns) % self.timesteps for turn in range(self.turns)
        )
        return level in levels

    def _batch(
        self, indices: list[int], level: int, t: float, device: torch.device | str, stands_in: bool
    ) -> HeldOutBatch:
        clean = self.source.batch(indices)
        shape = tuple(clean.shape[1:])
        noise = torch.stack([normal(self.seed, shape, "held_out_noise", level, index) for index in indices])
        times = torch.full((len(indices),), t, device=device)
        condition = conditions_of(self.source, indices).to(device)
        return HeldOutBatch(clean.to(device), condition, noise.to(device), times, stands_in)
