"""Multiply-accumulates by formula: one differentiable count for the loss, the profiler and the console.

The papers' "FLOPs" are multiply-accumulates. Attention over n tokens costs 4nC^2 + 2n^2C, of which the share of active heads is
executed; the MLP costs 2nC * hidden, of which the share of active groups times the share of kept tokens is executed. LayerNorm
counts 4 an element, as in fvcore: DiT-XL/2 at 256 px is 118.6887 G with it, 118.6214 G without.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing

LAYERNORM_MACS = 4
FREQUENCY_SIZE = 256
TOKEN_ROUTER_REDUCTION = 16


class HasGeometry(Protocol):
    """Anything that says its geometry, such as a model."""

    geometry: Geometry


@dataclass(frozen=True)
class MacsReport:
    """Multiply-accumulates of one forward pass of one image, by part.

    Attributes:
        attention: Projections and products of attention. mlp: fc1 and fc2. embeddings: Patches and timestep.
        modulation: adaLN of blocks and final layer. final: Output projection. layernorm: 4 an element.
        routers: Width and token routers; 0 for a static model.
    """

    attention: float
    mlp: float
    embeddings: float
    modulation: float
    final: float
    layernorm: float
    routers: float

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


def attention_macs(geometry: Geometry) -> float:
    """MACs of one block's complete attention, for one image."""
    tokens, channels = geometry.num_tokens, geometry.hidden_size
    return 4.0 * tokens * channels**2 + 2.0 * tokens**2 * channels


def mlp_macs(geometry: Geometry) -> float:
    """MACs of one block's complete MLP, for one image."""
    return 2.0 * geometry.num_tokens * geometry.hidden_size * geometry.mlp_hidden


def executed_ratio(routing: Routing, geometry: Geometry) -> Tensor:
    """The share of attention and MLP MACs that is executed, (B,), with the gradient of the masks.

    Source: DyDiT, section 3.4 (F_dynamic / F_static), with routers, embeddings and modulation left out as there.
    """
    attention, mlp = attention_macs(geometry), mlp_macs(geometry)
    executed = [
        attention * block.heads.float().mean(dim=1)
        + mlp * block.groups.float().mean(dim=1) * block.tokens.float().mean(dim=1)
        for block in routing.blocks
    ]
    return torch.stack(executed).mean(dim=0) / (attention + mlp)


def ratio_floor(geometry: Geometry) -> float:
    """The least ratio that training can reach: one head, one group and no token, or 0 without always-on units."""
    if not geometry.always_on:
        return 0.0
    attention, mlp = attention_macs(geometry), mlp_macs(geometry)
    return (attention / geometry.num_heads) / (attention + mlp)


def macs_of(geometry: Geometry, routing: Routing | None = None) -> MacsReport:
    """Count one image's forward pass.

    Args:
        geometry: The model's.
        routing: What was executed, averaged over its batch; None counts the static model, without routers.
    """
    channels, tokens, depth = geometry.hidden_size, geometry.num_tokens, geometry.depth
    patch_area = geometry.patch_size**2
    if routing is None:
        heads = mlp_share = kept = 1.0
        routers = 0.0
    else:
        heads = float(routing.heads.float().mean())
        kept = float(routing.tokens.float().mean())
        groups = routing.groups.float().mean(dim=2)
        mlp_share = float((groups * routing.tokens.float().mean(dim=2)).mean())
        routers = depth * router_macs(geometry)
    return MacsReport(
        attention=depth * attention_macs(geometry) * heads,
        mlp=depth * mlp_macs(geometry) * mlp_share,
        embeddings=float(
            tokens * patch_area * geometry.in_channels * channels + FREQUENCY_SIZE * channels + channels**2
        ),
        modulation=float((6 * depth + 2) * channels**2),
        final=float(tokens * channels * patch_area * geometry.out_channels),
        layernorm=LAYERNORM_MACS * tokens * channels * (depth * (1 + kept) + 1),
        routers=routers,
    )


def router_macs(geometry: Geometry) -> float:
    """MACs of one block's three routers, for one image."""
    channels = geometry.hidden_size
    inner = max(1, channels // TOKEN_ROUTER_REDUCTION)
    rows = geometry.num_heads + geometry.num_groups - 2 * int(geometry.always_on)
    return float(channels * rows + geometry.num_tokens * (channels * inner + inner))


def count_macs(model: HasGeometry, routing: Routing | None = None) -> MacsReport:
    """Count a model's multiply-accumulates by formula.

    Args:
        model: A model of `load_model`, or anything with a ``geometry``.
        routing: The decisions to count, as `model.routing(...)` or `model.denoise(...)` give them; None counts the static model.

    Returns:
        MACs of one image's forward pass, by part.
    """
    return macs_of(model.geometry, routing)
