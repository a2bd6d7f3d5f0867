"""The decisions of a trained model on held-out images: by noise level and block, and on the garment and beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dydit_cli.artifacts import load_model, read_manifest
from dydit_cli.data import open_data
from dydit_cli.dynamic.costs import BlockCost
from dydit_cli.dynamic.gates import ThresholdGating
from dydit_cli.dynamic.routing import BlockRouting
from dydit_cli.execution import CompactExecutor
from dydit_cli.families.registry import family_of
from dydit_cli.objectives import HeldOutDraws, objective_of
from dydit_cli.profiling.token_maps import TokenMaps, token_maps

LEVELS = 24
IMAGES = 300
SHOWN_IMAGES, SHOWN_NOISE = 8, (0.95, 0.6, 0.2)
"""Images, each of another class, and the shares of noise at which they are shown, as nearly as the levels allow."""
REGIONS = ("garment", "edge", "background")

BACKGROUND = -0.9
"""Pixels run from -1 (black, the background of Fashion-MNIST) to 1; what is brighter by a twentieth of that is garment."""
INSIDE = 0.5
"""A token is on the garment if this share of its pixels is, and beside it if none is; between is the edge."""


@dataclass(frozen=True)
class Decisions:
    """Shares of active units, means over images; T noise levels, the noisiest first, and L blocks.

    Attributes:
        name: Of the model, for tables and pictures.
        family: ``dit`` or ``sit``.
        facts: ``target_ratio``, ``ratio``, ``steps`` and ``seed`` of its training, as far as its manifest has them.
        noise: (T,) share of noise in the input.
        heads, groups, tokens: (T, L) shares that are on.
        width: (T, L) share of a block's attention and MLP MACs that its heads and groups leave, tokens aside.
        macs: (T, L) the same with tokens.
        narrowest: (T, L) whether no unit is on but those that always are.
        regions: (T, 3) share of blocks in which a token of `REGIONS` is kept.
        region_sizes: (3,) share of the tokens that lie there.
        images: How many were seen at every level.
        maps: Tokens of a few images at a few levels.
    """

    name: str
    family: str
    facts: dict[str, Any]
    noise: np.ndarray
    heads: np.ndarray
    groups: np.ndarray
    tokens: np.ndarray
    width: np.ndarray
    macs: np.ndarray
    narrowest: np.ndarray
    regions: np.ndarray
    region_sizes: np.ndarray
    images: int
    maps: TokenMaps


@torch.no_grad()
def decisions_of(
    folder: Path, data: str, *, images: int = IMAGES, levels: int = LEVELS, seed: int = 0
) -> Decisions:
    """Run held-out images, each at every noise level, through a trained model.

    Args:
        folder: Of the model; a DiT or SiT with routers, of images with one channel.
        data: As a recipe takes it; its held-out images are used.
        images: How many.
        levels: Noise levels, evenly spaced in t.
        seed: Of the choice of images and of the noise.
    """
    model = load_model(folder, execution="compact", convention="native")
    geometry, objective = model.geometry, objective_of(model)
    source = open_data(data, geometry=geometry).held_out
    draws = HeldOutDraws(source, objective, images, levels, per_image=levels, seed=seed)
    costs = geometry.block_costs()
    seen: dict[float, list[dict[str, Tensor]]] = {}
    for batch in draws.batches("cpu"):
        noisy = objective.noised(batch.clean, batch.noise, batch.t)
        _, routing = model.denoise(
            noisy, batch.t, batch.condition, executor=CompactExecutor(), gating=ThresholdGating(0.0)
        )
        regions = regions_of(batch.clean, geometry.patch_size)
        seen.setdefault(float(batch.t[0]), []).append(_rows(routing.blocks, costs, regions))
    levels_seen = {t: _means(rows) for t, rows in seen.items()}
    noise = {t: float(objective.noise_level(torch.tensor([t]))[0]) for t in levels_seen}
    order = sorted(levels_seen, key=lambda t: noise[t], reverse=True)
    stacked = {name: np.stack([levels_seen[t][name] for t in order]) for name in levels_seen[order[0]]}
    facts = _facts(folder)
    return Decisions(
        name=_name(family_of(model).title, facts),
        family=model.family,
        facts=facts,
        noise=np.array([noise[t] for t in order]),
        **{name: stacked[name] for name in ("heads", "groups", "tokens", "width", "macs")},
        narrowest=stacked["narrowest"] > 0.5,
        regions=stacked["regions"],
        region_sizes=stacked["region_sizes"].mean(axis=0),
        images=draws.samples,
        maps=_at(SHOWN_NOISE, token_maps(model, source, objective, seed, levels=levels, images=SHOWN_IMAGES)),
    )


def regions_of(clean: Tensor, patch_size: int) -> Tensor:
    """(B, 1, h, w) images -> (B, N, 3) of 0 and 1: on the garment, on its edge, or beside it, in the order of the tokens."""
    bright = (clean[:, :1] > BACKGROUND).float()
    share = torch.nn.functional.avg_pool2d(bright, patch_size).flatten(1)
    inside, outside = share >= INSIDE, share == 0
    return torch.stack([inside, ~inside & ~outside, outside], dim=-1).float()


def _rows(
    blocks: tuple[BlockRouting, ...], costs: tuple[BlockCost, ...], regions: Tensor
) -> dict[str, Tensor]:
    """One batch's values, a row an image."""
    kept = torch.stack([block.tokens.float() for block in blocks], dim=1)
    whole = [replace(block, tokens=torch.ones_like(block.tokens)) for block in blocks]
    narrowest = [(block.heads.sum(1) <= 1) & (block.groups.sum(1) <= 1) for block in blocks]
    return {
        "heads": torch.stack([block.heads.float().mean(1) for block in blocks], dim=1),
        "groups": torch.stack([block.groups.float().mean(1) for block in blocks], dim=1),
        "tokens": kept.mean(2),
        "width": _shares(whole, costs),
        "macs": _shares(blocks, costs),
        "narrowest": torch.stack(narrowest, dim=1).float(),
        "kept_in": torch.einsum("bn,bnr->br", kept.mean(1), regions),
        "tokens_in": regions.sum(1),
    }


def _shares(blocks: list[BlockRouting] | tuple[BlockRouting, ...], costs: tuple[BlockCost, ...]) -> Tensor:
    """(B, L) shares of each block's attention and MLP MACs."""
    return torch.stack(
        [
            torch.as_tensor(sum(cost.executed(block))) / float(sum(cost.complete))
            for cost, block in zip(costs, blocks, strict=True)
        ],
        dim=1,
    )


def _means(rows: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Over the images of a level; of regions over their tokens."""
    joined = {name: torch.cat([row[name] for row in rows]).double() for name in rows[0]}
    kept, among = joined.pop("kept_in").sum(0), joined.pop("tokens_in").sum(0)
    means = {name: values.mean(0).numpy() for name, values in joined.items()}
    return means | {"regions": (kept / among).numpy(), "region_sizes": (among / among.sum()).numpy()}


def _at(noise: tuple[float, ...], maps: TokenMaps) -> TokenMaps:
    """The levels nearest to some shares of noise."""
    places = [int((maps.noise_level - share).abs().argmin()) for share in noise]
    return replace(
        maps,
        noise_level=maps.noise_level[places],
        t=maps.t[places],
        noised=maps.noised[:, places],
        masks=maps.masks[:, places],
    )


def _facts(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    results, settings = manifest.get("results") or {}, manifest.get("settings") or {}
    return {
        "target_ratio": results.get("target_ratio"),
        "ratio": results.get("ratio"),
        "steps": results.get("steps"),
        "seed": settings.get("seed"),
    }


def _name(title: str, facts: dict[str, Any]) -> str:
    target, seed = facts["target_ratio"], facts["seed"]
    return title + ("" if target is None else f", λ {target:g}") + ("" if seed is None else f", seed {seed}")
