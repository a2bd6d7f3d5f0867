"""Where in an image the tokens are kept: a few held-out images, each at several noise levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.data import Source
from dydit_cli.dynamic.gates import ThresholdGating
from dydit_cli.execution import CompactExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import Objective
from dydit_cli.randomness import normal

LEVELS = 6
IMAGES = 3


@dataclass(frozen=True)
class TokenMaps:
    """Noised images and the tokens that their MLPs saw; the noisiest level first.

    Attributes:
        noise_level: (T,). t: (T,).
        clean: (K, C, h, w).
        noised: (K, T, C, h, w).
        kept: (K, T, side, side), the share of blocks in which a token is kept.
    """

    noise_level: Tensor
    t: Tensor
    clean: Tensor
    noised: Tensor
    kept: Tensor


@torch.no_grad()
def token_maps(model: DynamicModel, source: Source, objective: Objective, seed: int = 0) -> TokenMaps:
    """Run a few samples of distinct classes through a model and note which tokens it keeps.

    Args:
        model: In eval mode; thresholds with its ``keep_bias``.
        source: Held-out samples.
        objective: Of the model's family.
        seed: Of the noise, which is the same at all levels, so that one sees one image fade.
    """
    chosen = _of_distinct_classes(source.labels, IMAGES)
    clean, labels = source.batch(chosen), source.labels[chosen]
    noise = torch.stack([normal(seed, tuple(clean.shape[1:]), "token_maps", index) for index in chosen])
    grid = objective.grid(LEVELS)
    order = objective.noise_level(grid).argsort(descending=True)
    side = model.geometry.sample_size // model.geometry.patch_size
    noised, kept = [], []
    for t in grid[order].tolist():
        times = torch.full((len(chosen),), t)
        states = objective.noised(clean, noise, times)
        _, routing = model.denoise(
            states.to(model.device),
            times.to(model.device),
            labels.to(model.device),
            executor=CompactExecutor(),
            gating=ThresholdGating(model.keep_bias),
        )
        noised.append(states)
        kept.append(routing.tokens.float().mean(dim=1).unflatten(1, (side, side)).cpu())
    return TokenMaps(
        noise_level=objective.noise_level(grid)[order],
        t=grid[order],
        clean=clean,
        noised=torch.stack(noised, dim=1),
        kept=torch.stack(kept, dim=1),
    )


def _of_distinct_classes(labels: Tensor, count: int) -> list[int]:
    """The first samples whose classes differ, as far as there are so many."""
    chosen: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        chosen.setdefault(label, index)
        if len(chosen) == count:
            break
    rest = (index for index in range(len(labels)) if index not in set(chosen.values()))
    return [*chosen.values(), *rest][: min(count, len(labels))]
