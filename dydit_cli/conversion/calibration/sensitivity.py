"""What each range of timesteps loses with each unit, at the masks that stand: second order in gates, measured anew after every cut.

With a gate m_u at every unit, J_u = dF/dm_u of the prediction F, and D its distance from the complete model's prediction, switching u
off changes the squared distance by |J_u|^2 - 2 D.J_u. The score is |J_u|^2 + 2 |D.J_u|, per value of the prediction. Near an optimum the
denoising loss grows by just this distance, without the noise of its targets. [ours]

* The sign of D.J_u is not trusted: a unit whose loss seems to make up for those lost before is a unit that extrapolation is wrong about
  (with it, the shipped DiT at a ratio of 0.8 lost 18 % where first-order Taylor scores of the loss lost 6 %).
* D.J_u is one backward pass. |J_u|^2 of all units comes of random directions v, since the mean of (v.J_u)^2 is |J_u|^2.
* Scores taken once, at the complete model, say little about one that has lost half of its units: what one did, others now have to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.conversion.calibration.units import Units
from dydit_cli.data.buckets import same_shape
from dydit_cli.data.conditions import conditions_of
from dydit_cli.data.source import Source
from dydit_cli.dynamic.gates import CompleteGating, Gating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.text_condition import Condition
from dydit_cli.objectives import Objective
from dydit_cli.randomness import generator, normal

DIRECTIONS = 2
"""Random ones, of each sample."""
LARGEST_BATCH = 32
ACTIVATIONS = 2**26
"""Tokens x channels x blocks of one pass, at most: what a backward pass remembers is about sixty bytes for each."""


@dataclass(frozen=True)
class GivenWidths:
    """A gating whose widths are given, gates between 0 and 1 included; every token is kept."""

    routing: Routing

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.routing.blocks[block].heads

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.routing.blocks[block].groups

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`. Asked of blocks with an MLP for text alone."""
        mask = self.routing.blocks[block].context_groups
        return torch.ones_like(logits) if mask is None else mask

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return torch.ones_like(logits)


@dataclass(frozen=True)
class Batch:
    """Noised samples of several ranges.

    Attributes:
        clean: (B, ..., C, h, w).
        condition: Labels or texts.
        noise: Of the same shape.
        t: (B,).
        ranges: (B,) int64 on the CPU, the number of each sample's range.
        directions: Normal numbers of the same shape.
    """

    clean: Tensor
    condition: Condition
    noise: Tensor
    t: Tensor
    ranges: Tensor
    directions: tuple[Tensor, ...]


@dataclass(frozen=True)
class Samples:
    """Training samples, the same number in every range of timesteps; a function of the seed and the round.

    Attributes:
        source: Where they come from.
        objective: Of the model's family.
        ranges: R, parts of the levels that a sampler visits evenly.
        per_range: Samples in each, at levels that lie evenly in it.
        seed: Of choice and noise.
        batch_size: Samples of a pass.
    """

    source: Source
    objective: Objective
    ranges: int
    per_range: int
    seed: int
    batch_size: int = LARGEST_BATCH

    def batches(self, turn: int, device: torch.device) -> Iterator[Batch]:
        """Those of round number ``turn``."""
        total = self.ranges * self.per_range
        order = torch.randperm(len(self.source), generator=generator(self.seed, "calibration", turn)).tolist()
        chosen = [order[place % len(order)] for place in range(total)]
        # Neighbours in the order belong to different ranges: small batches then see all of them.
        levels = self.objective.grid(total).view(self.ranges, self.per_range).T.flatten()
        places: dict[int, list[int]] = {}
        for place, index in enumerate(chosen):
            places.setdefault(index, []).append(place)
        for part in same_shape(self.source, sorted(set(chosen))):
            members = sorted(place for index in part for place in places[index])
            for start in range(0, len(members), self.batch_size):
                at = members[start : start + self.batch_size]
                indices = [chosen[place] for place in at]
                clean = self.source.batch(indices)
                shape = tuple(clean.shape[1:])
                noise = torch.stack(
                    [normal(self.seed, shape, "calibration-noise", turn, place) for place in at]
                )
                directions = [
                    torch.stack(
                        [
                            normal(self.seed, shape, "calibration-direction", turn, number, place)
                            for place in at
                        ]
                    )
                    for number in range(DIRECTIONS)
                ]
                yield Batch(
                    clean=clean.to(device),
                    condition=conditions_of(self.source, indices).to(device),
                    noise=noise.to(device),
                    t=levels[at].to(device),
                    ranges=torch.tensor(at) % self.ranges,
                    directions=tuple(direction.to(device) for direction in directions),
                )


def batch_size_for(geometry: Geometry) -> int:
    """How many samples of a model's usual size one pass takes."""
    return max(
        1, min(LARGEST_BATCH, ACTIVATIONS // (geometry.num_tokens * geometry.hidden_size * geometry.depth))
    )


def sensitivity(model: DynamicModel, units: Units, table: Tensor, samples: Samples, turn: int) -> Tensor:
    """Score every unit in every range.

    Args:
        model: Frozen; its parameters get no gradient.
        units: Its units.
        table: (R, U) bool, the masks that stand.
        samples: What to measure on.
        turn: Number of the round, for samples that it has not seen.

    Returns:
        (R, U) fp64 on the CPU.
    """
    curvature = torch.zeros(table.shape, dtype=torch.float64)
    slope = torch.zeros_like(curvature)
    executor = model.make_executor("dense")
    for batch in samples.batches(turn, model.device):
        gates = table[batch.ranges].to(model.device, torch.float32).requires_grad_(True)
        noisy = samples.objective.noised(batch.clean, batch.noise, batch.t)

        def predict(gating: Gating, noisy: Tensor = noisy, batch: Batch = batch) -> Tensor:
            prediction, _ = model.denoise(noisy, batch.t, batch.condition, executor=executor, gating=gating)
            # Of a learned variance nothing is asked: its loss is a small part, and on another scale.
            return prediction.float().narrow(-3, 0, noisy.shape[-3])

        prediction = predict(GivenWidths(units.routing(gates, 1)))
        values = prediction[0].numel()
        with torch.no_grad():
            distance = prediction - predict(CompleteGating())
        slope.index_add_(0, batch.ranges, _gradient(prediction, gates, distance / values))
        for direction in batch.directions:
            found = _gradient(prediction, gates, direction / math.sqrt(values))
            curvature.index_add_(0, batch.ranges, found.square() / len(batch.directions))
    return (curvature + 2 * slope.abs()) / samples.per_range


def _gradient(prediction: Tensor, gates: Tensor, direction: Tensor) -> Tensor:
    """(B, U) fp64 on the CPU: the derivative of each sample's prediction along a direction, by its gates."""
    (found,) = torch.autograd.grad((prediction * direction).sum(), gates, retain_graph=True)
    return found.cpu().double()
