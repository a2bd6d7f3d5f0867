"""The objective of FLUX: the velocity of a straight line from data (t = 0) to noise (t = 1), on a schedule that knows the resolution.

Large images need more noise before they are forgotten, so that FLUX's scheduler moves its noise levels up with the number of tokens:
sigma = e^mu / (e^mu + 1/u - 1) for evenly spaced u, mu linear in the tokens. In the logit of t that is a shift by mu, which is how
it is written here. Training asks mostly about the middle, t = sigmoid(location + scale * z + mu) with normal z, and the ratio of a
batch is weighted so that its mean is the one over the sampler's levels.

Source: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206); the shift by tokens: black-forest-labs/flux and
diffusers' FluxPipeline (``calculate_shift``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dydit_cli.objectives.timesteps import middles, strata

PATCH_AREA = 4
"""Latent pixels of one token."""
BASE_TOKENS, MAX_TOKENS = 256, 4096
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15
HEAVIEST = 20.0
"""Bound of a sample's weight: logit-normal draws hardly visit the ends of the axis, where exact weights have no finite variance.

What it costs: the weighted mean of a step function is off by up to 0.02, and by 0.05 at 1024 px if draws do not move with the levels.
"""
EDGE = 1e-6


def shift_of(tokens: int) -> float:
    """mu of FLUX's schedule for an image of ``tokens`` tokens: 0.5 at 256 (256 px), 1.15 at 4,096 (1024 px), on a line."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_SHIFT + slope * (tokens - BASE_TOKENS)


@dataclass(frozen=True)
class RectifiedFlowObjective:
    """x_t = (1 - t) * clean + t * noise, v = noise - clean, t in [0, 1].

    Attributes:
        location: Mean of the normal whose sigmoid draws t.
        scale: Its standard deviation.
        mu: Shift of the sampler's levels, and of the draws with them, in the logit of t; 0 for none.
        shift_draws: Whether the draws move with the levels.
    """

    location: float = 0.0
    scale: float = 1.0
    mu: float = 0.0
    shift_draws: bool = True
    kind = "rectified-flow"
    num_strata = 4

    def for_shape(self, shape: Sequence[int]) -> RectifiedFlowObjective:
        """The same on the levels of a resolution: ``shape`` is (..., h, w) in latent pixels."""
        return replace(self, mu=shift_of(shape[-2] * shape[-1] // PATCH_AREA))

    def draw_timesteps(self, uniforms: Tensor, indices: Sequence[int]) -> Tensor:
        """See `Objective`: the quantiles of the logit-normal at stratified uniforms."""
        even = strata(uniforms, indices, self.num_strata).clamp(min=EDGE, max=1 - EDGE)
        return torch.sigmoid(self._centre + self.scale * torch.special.ndtri(even))

    def grid(self, count: int) -> Tensor:
        """See `Objective`: the sampler's levels, which are the evenly spaced ones shifted by ``mu``."""
        return torch.sigmoid(torch.logit(middles(count)) + self.mu)

    def ratio_weights(self, t: Tensor) -> Tensor | None:
        """See `Objective`: the density of the sampler's levels at t over that of the draws, at most 20."""
        logits = torch.logit(t.float(), eps=EDGE)
        levels = torch.sigmoid(logits - self.mu)
        z = (logits - self._centre) / self.scale
        draws = torch.exp(-0.5 * z**2) / (self.scale * math.sqrt(2 * math.pi))
        return (levels * (1 - levels) / draws).clamp(max=HEAVIEST)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See `Objective`."""
        time = t.view(-1, *[1] * (clean.dim() - 1))
        return (1 - time) * clean + time * noise

    def losses(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """See `Objective`: the mean squared error of the velocity."""
        mse = ((prediction.float() - (noise - clean)) ** 2).flatten(1).mean(dim=1)
        return {"loss": mse, "mse": mse}

    def noise_level(self, t: Tensor) -> Tensor:
        """See `Objective`: t is the weight of the noise."""
        return t

    @property
    def _centre(self) -> float:
        return self.location + (self.mu if self.shift_draws else 0.0)
