"""Stratified timesteps on the unit interval; an objective stretches them to its own axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def strata(uniforms: Tensor, indices: Sequence[int], num_strata: int) -> Tensor:
    """Move (B,) uniforms into the stratum of their sample: (i mod n + u) / n, in [0, 1).

    The timesteps of a batch then cover the axis evenly, which keeps the variance of its mean MACs ratio low
    (released code of DyDiT). Strata go by the *global* index, so that a batch split over processes covers it
    as well.
    """
    parts = torch.tensor(
        [index % num_strata for index in indices], dtype=uniforms.dtype, device=uniforms.device
    )
    # Rounding may lift (3 + 0.99999994) / 4 to 1, which lies outside.
    return ((parts + uniforms) / num_strata).clamp(max=1 - 2**-24)


def middles(count: int) -> Tensor:
    """(count,) middles of equal parts of [0, 1], fp32."""
    return (torch.arange(count, dtype=torch.float32) + 0.5) / count
