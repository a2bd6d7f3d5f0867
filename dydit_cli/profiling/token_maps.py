"""Where tokens are kept: a few held-out images, or frames of a held-out video, each at several noise levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.data import Source
from dydit_cli.data.buckets import same_shape
from dydit_cli.data.conditions import conditions_of
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
        masks: (K, T, L, side, side), whether each block keeps a token.
        labels: (K,) classes of the images; none where there are none.
        frames: Of a video, the numbers of the K frames that are shown, from 0; None for K images.
    """

    noise_level: Tensor
    t: Tensor
    clean: Tensor
    noised: Tensor
    masks: Tensor
    labels: tuple[int, ...] = ()
    frames: tuple[int, ...] | None = None

    @property
    def kept(self) -> Tensor:
        """(K, T, side, side), the share of blocks in which a token is kept."""
        return self.masks.float().mean(dim=2)


@torch.no_grad()
def token_maps(
    model: DynamicModel,
    source: Source,
    objective: Objective,
    seed: int = 0,
    *,
    levels: int = LEVELS,
    images: int = IMAGES,
) -> TokenMaps:
    """Run a few samples of distinct classes through a model and note which tokens it keeps; of a video model, one video, of
    which the first, the middle and the last frame are shown.

    Args:
        model: In eval mode; thresholds with its ``keep_bias``.
        source: Held-out samples.
        objective: Of the model's family.
        seed: Of the noise, which is the same at all levels, so that one sees one image fade.
        levels: How many noise levels.
        images: How many images, at most.
    """
    geometry = model.geometry
    # Images of one shape; those of another would need a picture of their own.
    first = same_shape(source, range(len(source)))[0]
    distinct = _of_distinct_classes(source.labels[first], 1 if geometry.num_frames else images)
    chosen = [first[place] for place in distinct]
    clean, condition = source.batch(chosen), conditions_of(source, chosen)
    noise = torch.stack([normal(seed, tuple(clean.shape[1:]), "token_maps", index) for index in chosen])
    grid = objective.grid(levels)
    order = objective.noise_level(grid).argsort(descending=True)
    sides = tuple(length // geometry.patch_size for length in clean.shape[-2:])
    places = (geometry.num_frames, *sides) if geometry.num_frames else sides
    noised, kept = [], []
    for t in grid[order].tolist():
        times = torch.full((len(chosen),), t)
        states = objective.noised(clean, noise, times)
        _, routing = model.denoise(
            states.to(model.device),
            times.to(model.device),
            condition.to(model.device),
            executor=CompactExecutor(),
            gating=ThresholdGating(model.keep_bias),
        )
        noised.append(states)
        kept.append(routing.tokens.bool().unflatten(2, places).cpu())
    noise_levels = objective.noise_level(grid)[order]
    pictures, maps = torch.stack(noised, dim=1), torch.stack(kept, dim=1)
    if not geometry.num_frames:
        labels = tuple(int(source.labels[index]) for index in chosen) if geometry.num_classes else ()
        return TokenMaps(noise_levels, grid[order], clean, pictures, maps, labels)
    frames = sorted({0, geometry.num_frames // 2, geometry.num_frames - 1})
    return TokenMaps(
        noise_levels,
        grid[order],
        clean[0, frames],
        pictures[0][:, frames].transpose(0, 1),
        maps[0][:, :, frames].permute(2, 0, 1, 3, 4),
        frames=tuple(frames),
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
