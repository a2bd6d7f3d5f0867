"""Multiply-accumulates by formula: one differentiable count for the loss, the profiler and the console.

The papers' "FLOPs" are multiply-accumulates. What a block costs, complete and as executed, is in `dynamic/costs.py`. LayerNorm
counts 4 an element, as in fvcore: DiT-XL/2 at 256 px is 118.6887 G with it, 118.6214 G without.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from dydit_cli.dynamic.costs import CostedGeometry
from dydit_cli.dynamic.routing import BlockRouting, Routing


class HasGeometry(Protocol):
    """Anything that says its geometry, such as a model."""

    @property
    def geometry(self) -> CostedGeometry:
        """Its numbers."""
        ...


@dataclass(frozen=True)
class MacsReport:
    """Multiply-accumulates of one forward pass of one image, by part.

    Attributes:
        attention: Projections and products of attention. mlp: fc1 and fc2. embeddings: Patches and timestep.
        modulation: adaLN of blocks and final layer. final: Output projection. layernorm: 4 an element.
        routers: Width and token routers; 0 for a static model.
        cross_attention: To a prompt, which stays static and is no part of the ratio; 0 for models without.
    """

    attention: float
    mlp: float
    embeddings: float
    modulation: float
    final: float
    layernorm: float
    routers: float
    cross_attention: float = 0.0

    @property
    def total(self) -> float:
        """Everything, LayerNorm included (fvcore's convention)."""
        return sum(asdict(self).values())

    @property
    def total_without_layernorm(self) -> float:
        """Everything but LayerNorm (torch's counter has no entry for it)."""
        return self.total - self.layernorm

    @property
    def routed(self) -> float:
        """Attention and MLP, which are what the ratio of the paper refers to."""
        return self.attention + self.mlp


def attention_macs(geometry: CostedGeometry) -> float:
    """MACs of a block's complete attention, for one image; the mean over the blocks."""
    costs = geometry.block_costs()
    return sum(float(cost.complete.attention) for cost in costs) / len(costs)


def mlp_macs(geometry: CostedGeometry) -> float:
    """MACs of a block's complete MLP, for one image; the mean over the blocks."""
    costs = geometry.block_costs()
    return sum(float(cost.complete.mlp) for cost in costs) / len(costs)


def executed_ratio(routing: Routing, geometry: CostedGeometry) -> Tensor:
    """The share of attention and MLP MACs that is executed, (B,), with the gradient of the masks.

    Source: DyDiT, section 3.4 (F_dynamic / F_static), with routers, embeddings and modulation left out as there.
    """
    costs = _of_routing(geometry, routing).block_costs()
    # Shares first: sums of MACs would lose digits in fp32.
    static = sum(float(sum(cost.complete)) for cost in costs)
    # Blocks that cost alike are counted as rows of one: few operations, where a sampler counts at every step.
    alike: dict[Hashable, list[int]] = {}
    for place, (cost, block) in enumerate(zip(costs, routing.blocks, strict=True)):
        alike.setdefault((cost, *_shapes(block)), []).append(place)
    executed: dict[int, Tensor] = {}
    for places in alike.values():
        macs = costs[places[0]].executed(_as_rows([routing.blocks[place] for place in places]))
        shares = torch.as_tensor(sum(macs) / static).unflatten(0, (len(places), -1))
        executed |= zip(places, shares, strict=True)
    return torch.stack([executed[place] for place in range(len(costs))]).sum(dim=0)


def _shapes(block: BlockRouting) -> tuple[Hashable, ...]:
    masks = (block.heads, block.groups, block.tokens, block.context_groups)
    return tuple(None if mask is None else mask.shape for mask in masks)


def _as_rows(blocks: Sequence[BlockRouting]) -> BlockRouting:
    """The decisions of several blocks as those of one whose batch is as many times larger."""
    contexts = [block.context_groups for block in blocks if block.context_groups is not None]
    return BlockRouting(
        torch.cat([block.heads for block in blocks]),
        torch.cat([block.groups for block in blocks]),
        torch.cat([block.tokens for block in blocks]),
        torch.cat(contexts) if contexts else None,
    )


def _of_routing(geometry: CostedGeometry, routing: Routing) -> CostedGeometry:
    """The geometry of the sample that was routed, which may be larger or smaller than the model's usual ones."""
    return geometry.with_tokens(routing.blocks[0].tokens.shape[1])


def ratio_floor(geometry: CostedGeometry) -> float:
    """The least ratio that training can reach: one head, one group and no token, or 0 without always-on units."""
    if not geometry.always_on:
        return 0.0
    costs = geometry.block_costs()
    least = sum(cost.floor(geometry.num_heads, geometry.num_groups) for cost in costs)
    return least / sum(float(sum(cost.complete)) for cost in costs)


def macs_of(geometry: CostedGeometry, routing: Routing | None = None) -> MacsReport:
    """Count one image's forward pass.

    Args:
        geometry: The model's.
        routing: What was executed, averaged over its batch; None counts the static model, without routers.
    """
    if routing is not None:
        geometry = _of_routing(geometry, routing)
    costs = geometry.block_costs()
    if routing is None:
        blocks = [cost.complete for cost in costs]
        kept = [1.0] * len(costs)
    else:
        blocks = [cost.executed(block) for cost, block in zip(costs, routing.blocks, strict=True)]
        kept = [float(block.tokens.float().mean()) for block in routing.blocks]
    around = geometry.surrounding_macs(kept)
    return MacsReport(
        attention=sum(mean_of(macs.attention) for macs in blocks),
        mlp=sum(mean_of(macs.mlp) for macs in blocks),
        embeddings=around.embeddings,
        modulation=around.modulation,
        final=around.final,
        layernorm=around.layernorm,
        routers=0.0 if routing is None else sum(geometry.block_router_macs()),
        cross_attention=around.cross_attention,
    )


def mean_of(value: float | Tensor) -> float:
    """A number as it is, a tensor's mean."""
    return float(value.cpu().double().mean()) if isinstance(value, Tensor) else value


def router_macs(geometry: CostedGeometry) -> float:
    """MACs of one block's routers, for one image; the mean over the blocks."""
    routers = geometry.block_router_macs()
    return sum(routers) / len(routers)


def count_macs(model: HasGeometry, routing: Routing | None = None) -> MacsReport:
    """Count a model's multiply-accumulates by formula.

    Args:
        model: A model of `load_model`, or anything with a ``geometry``.
        routing: The decisions to count, as `model.routing(...)` or `model.denoise(...)` give them; None counts the static model.

    Returns:
        MACs of one image's forward pass, by part.
    """
    return macs_of(model.geometry, routing)
