"""What a model executes, by noise level and block: the routers' decisions on held-out samples, summed up.

The samples, timesteps and noise are those of `dydit_cli.objectives`' ratio, so that the means over them are that ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from dydit_cli.dynamic.gates import CompleteGating, Gating, ThresholdGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution import CompactExecutor, Executor, StaticExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.resolution import geometry_of
from dydit_cli.flops import executed_ratio, macs_of
from dydit_cli.objectives import HeldOutBatch, HeldOutDraws, Objective

GIGA = 1e9


@dataclass(frozen=True)
class TimestepShares:
    """What is executed at one timestep, mean over images and blocks; shares of the static model are in [0, 1].

    Attributes:
        t: In the family's own convention.
        noise_level: 1 is pure noise.
        heads, groups, tokens: Shares of active units.
        gmacs: Of everything, LayerNorm and routers included, an image.
        ratio: Of attention and MLP MACs.
    """

    t: float
    noise_level: float
    heads: float
    groups: float
    tokens: float
    gmacs: float
    ratio: float


@dataclass(frozen=True)
class BlockShares:
    """Shares of active units by timestep and block, mean over images.

    Attributes:
        t: (T,) timesteps, ascending. noise_level: (T,).
        heads, groups, tokens: (T, L).
    """

    t: list[float]
    noise_level: list[float]
    heads: list[list[float]]
    groups: list[list[float]]
    tokens: list[list[float]]


@dataclass(frozen=True)
class Executed:
    """What is executed, and its means over all images and timesteps.

    Attributes:
        ratio: Of attention and MLP MACs.
        gmacs: Of everything, LayerNorm and routers included.
        gmacs_without_layernorm: The same without LayerNorm.
        images: Samples seen.
        timesteps: By timestep, ascending in t.
        blocks: By timestep and block.
    """

    ratio: float
    gmacs: float
    gmacs_without_layernorm: float
    images: int
    timesteps: tuple[TimestepShares, ...]
    blocks: BlockShares


@dataclass(frozen=True)
class _Rows:
    """One batch's values: (B,) ratios, (B, 3, L) shares, (B, 2) GMACs with and without LayerNorm."""

    ratio: Tensor
    shares: Tensor
    gmacs: Tensor


@torch.no_grad()
def measure_shares(
    model: DynamicModel,
    draws: HeldOutDraws,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Executed:
    """Run held-out samples through a model and sum up what it executes.

    Args:
        model: In eval mode; thresholds with its ``keep_bias``, or everything if its execution is static.
        draws: Samples, timesteps and noise.
        on_progress: Told how many samples of how many are done.
    """
    static = model.execution == "static"
    executor: Executor = StaticExecutor() if static else CompactExecutor()
    gating: Gating = CompleteGating() if static else ThresholdGating(model.keep_bias)
    levels: dict[float, list[_Rows]] = {}
    done, total = 0, draws.samples * draws.turns
    for batch in draws.batches(model.device):
        routing = _decisions(model, draws.objective, batch, executor, gating)
        geometry = geometry_of(model.geometry, batch.clean.shape, batch.condition)
        levels.setdefault(float(batch.t[0]), []).append(_rows(routing, geometry, static))
        done += len(batch.t)
        on_progress(done, total)
    return _summed_up(
        {t: _joined(rows) for t, rows in sorted(levels.items())}, draws.objective, draws.samples
    )


def _decisions(
    model: DynamicModel, objective: Objective, batch: HeldOutBatch, executor: Executor, gating: Gating
) -> Routing:
    noisy = objective.noised(batch.clean, batch.noise, batch.t)
    _, routing = model.denoise(noisy, batch.t, batch.condition, executor=executor, gating=gating)
    return routing.cpu()


def _rows(routing: Routing, geometry: Geometry, static: bool) -> _Rows:
    ratio = executed_ratio(routing, geometry).double()
    masks = (routing.heads, routing.groups, routing.tokens)
    report = macs_of(geometry, None if static else routing)
    # The formula gives the mean over the batch; written once a sample, batches of different sizes weigh as they should.
    gmacs = torch.tensor([report.total / GIGA, report.total_without_layernorm / GIGA], dtype=torch.float64)
    return _Rows(
        ratio=ratio,
        shares=torch.stack([mask.double().mean(dim=2) for mask in masks], dim=1),
        gmacs=gmacs.expand(len(ratio), 2),
    )


def _joined(rows: list[_Rows]) -> _Rows:
    return _Rows(
        torch.cat([row.ratio for row in rows]),
        torch.cat([row.shares for row in rows]),
        torch.cat([row.gmacs for row in rows]),
    )


def _summed_up(levels: dict[float, _Rows], objective: Objective, images: int) -> Executed:
    noise = objective.noise_level(torch.tensor(list(levels))).tolist()
    by_block = [rows.shares.mean(dim=0).tolist() for rows in levels.values()]
    timesteps = []
    for (t, rows), level in zip(levels.items(), noise, strict=True):
        heads, groups, tokens = rows.shares.mean(dim=(0, 2)).tolist()
        timesteps.append(
            TimestepShares(
                t, level, heads, groups, tokens, float(rows.gmacs[:, 0].mean()), float(rows.ratio.mean())
            )
        )
    # Timesteps weigh alike, also where the images do not divide by their number and some of them see one image more.
    gmacs, without_layernorm = (
        torch.stack([rows.gmacs.mean(dim=0) for rows in levels.values()]).mean(dim=0).tolist()
    )
    return Executed(
        ratio=fmean(step.ratio for step in timesteps),
        gmacs=gmacs,
        gmacs_without_layernorm=without_layernorm,
        images=images,
        timesteps=tuple(timesteps),
        blocks=BlockShares(
            t=list(levels),
            noise_level=noise,
            heads=[shares[0] for shares in by_block],
            groups=[shares[1] for shares in by_block],
            tokens=[shares[2] for shares in by_block],
        ),
    )
