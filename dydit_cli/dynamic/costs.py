"""Multiply-accumulates of a block by formula, complete and as executed; differentiable in the masks.

One sample's numbers. Attention over T tokens in sequences of n costs 4TC^2 + 2TnC, of which the share of active heads is executed;
an MLP costs 2TC * hidden, of which the share of active groups times the share of kept tokens is executed. Routers, embeddings and
modulation are left out, as in the ratio of the paper (DyDiT, arXiv 2410.03456, section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from dydit_cli.dynamic.routing import BlockRouting

LAYERNORM_MACS = 4
"""An element, as fvcore counts."""


class Macs(NamedTuple):
    """MACs of attention and MLPs, numbers or (B,) tensors."""

    attention: float | Tensor
    mlp: float | Tensor


class Surroundings(NamedTuple):
    """MACs of one forward pass of one sample outside attention, MLPs and routers.

    Attributes:
        embeddings: Patches, timestep, text. modulation: adaLN. final: Output projection. layernorm: 4 an element.
    """

    embeddings: float
    modulation: float
    final: float
    layernorm: float


class BlockCost(Protocol):
    """What one block of a model costs."""

    @property
    def complete(self) -> Macs:
        """Everything on, as numbers."""
        ...

    def executed(self, routing: BlockRouting) -> Macs:
        """What masks leave, each (B,), with their gradient."""
        ...

    def floor(self, num_heads: int, num_groups: int) -> float:
        """The least that always-on units and no skippable token leave."""
        ...


class CostedGeometry(Protocol):
    """What the formula needs of a model's geometry."""

    @property
    def num_heads(self) -> int:
        """H."""
        ...

    @property
    def num_groups(self) -> int:
        """G."""
        ...

    @property
    def always_on(self) -> bool:
        """Whether the first head and group have no router row."""
        ...

    def block_costs(self) -> Sequence[BlockCost]:
        """What each block costs."""
        ...

    def block_router_macs(self) -> Sequence[float]:
        """MACs of each block's routers, for one sample."""
        ...

    def surrounding_macs(self, kept: Sequence[float]) -> Surroundings:
        """Everything else, where each block's MLP sees a share ``kept`` of its tokens."""
        ...


@dataclass(frozen=True)
class SequentialBlockCost:
    """Self-attention, then an MLP whose tokens are routed (DiT, SiT, Latte).

    Attributes:
        tokens: T, of one sample.
        length: n, tokens that attend to each other.
        channels: C.
        mlp_hidden: Hidden channels of the MLP.
    """

    tokens: int
    length: int
    channels: int
    mlp_hidden: int

    @property
    def complete(self) -> Macs:
        """See `BlockCost`."""
        attention = 4.0 * self.tokens * self.channels**2 + 2.0 * self.tokens * self.length * self.channels
        return Macs(attention, 2.0 * self.tokens * self.channels * self.mlp_hidden)

    def executed(self, routing: BlockRouting) -> Macs:
        """See `BlockCost`."""
        attention, mlp = self.complete
        return Macs(
            attention * routing.heads.float().mean(dim=1),
            mlp * routing.groups.float().mean(dim=1) * routing.tokens.float().mean(dim=1),
        )

    def floor(self, num_heads: int, num_groups: int) -> float:
        """See `BlockCost`."""
        return float(self.complete.attention) / num_heads
