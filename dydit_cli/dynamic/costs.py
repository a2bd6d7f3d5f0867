"""Multiply-accumulates of a block by formula, complete and as executed; differentiable in the masks.

One sample's numbers. Attention over T tokens in sequences of n costs 4TC^2 + 2TnC, of which the share of active heads is executed;
an MLP costs 2TC * hidden, of which the share of active groups times the share of kept tokens is executed. Routers, embeddings and
modulation are left out, as in the ratio of the paper (DyDiT, arXiv 2410.03456, section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
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
        cross_attention: To a prompt, where blocks have one that stays static.
    """

    embeddings: float
    modulation: float
    final: float
    layernorm: float
    cross_attention: float = 0.0


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

    def with_tokens(self, count: int) -> Self:
        """The geometry of a sample with ``count`` routed tokens, in families that take samples of any size."""
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


@dataclass(frozen=True)
class PrunedBlockCost:
    """A static block that was cut to a width of its own; everything that is left runs.

    Attributes:
        tokens: T, of one sample.
        length: n, tokens that attend to each other.
        channels: C.
        inner: Channels inside attention: the heads that are left times their width.
        mlp_hidden: Hidden channels that are left.
    """

    tokens: int
    length: int
    channels: int
    inner: int
    mlp_hidden: int

    @property
    def complete(self) -> Macs:
        """See `BlockCost`."""
        attention = (
            4.0 * self.tokens * self.channels * self.inner + 2.0 * self.tokens * self.length * self.inner
        )
        return Macs(attention, 2.0 * self.tokens * self.channels * self.mlp_hidden)

    def executed(self, routing: BlockRouting) -> Macs:
        """See `BlockCost`. Masks have no say."""
        everything = torch.ones(len(routing.heads), device=routing.heads.device)
        attention, mlp = self.complete
        return Macs(attention * everything, mlp * everything)

    def floor(self, num_heads: int, num_groups: int) -> float:
        """See `BlockCost`: nothing can be left out."""
        return float(sum(self.complete))


@dataclass(frozen=True)
class DoubleBlockCost:
    """A block of two streams: joint attention, then an MLP for each; the tokens of the image's are routed (FLUX).

    Attributes:
        image: N, tokens of the image.
        text: T, tokens of the text, of which none is ever skipped.
        channels: C.
        mlp_hidden: Hidden channels of either MLP.
        routed_width: Whether heads and groups are routed; else all of them run.
    """

    image: int
    text: int
    channels: int
    mlp_hidden: int
    routed_width: bool = True

    @property
    def complete(self) -> Macs:
        """See `BlockCost`."""
        total = self.image + self.text
        attention = 4.0 * total * self.channels**2 + 2.0 * total**2 * self.channels
        return Macs(attention, 2.0 * total * self.channels * self.mlp_hidden)

    def executed(self, routing: BlockRouting) -> Macs:
        """See `BlockCost`. Without masks of its own, the text's MLP is complete."""
        a_token = 2.0 * self.channels * self.mlp_hidden
        groups = routing.groups.float().mean(dim=1)
        context = routing.context_groups
        of_text = torch.ones_like(groups) if context is None else context.float().mean(dim=1)
        return Macs(
            float(self.complete.attention) * routing.heads.float().mean(dim=1),
            a_token * (self.image * groups * routing.tokens.float().mean(dim=1) + self.text * of_text),
        )

    def floor(self, num_heads: int, num_groups: int) -> float:
        """See `BlockCost`."""
        of_text = 2.0 * self.text * self.channels * self.mlp_hidden
        if not self.routed_width:
            return float(self.complete.attention) + of_text
        return float(self.complete.attention) / num_heads + of_text / num_groups


@dataclass(frozen=True)
class SingleBlockCost:
    """A block of one stream of text and image whose skipped image tokens are keys and values only (FLUX).

    With K tokens of text and kept image tokens out of S: keys and values cost 2SC^2; queries, output projection and MLP
    2KC^2 + 2KC * hidden; the products of attention 2KSC.

    Attributes:
        image: N. text: T. channels: C. mlp_hidden: Hidden channels of the MLP.
        routed_width: Whether heads and groups are routed; else all of them run.
    """

    image: int
    text: int
    channels: int
    mlp_hidden: int
    routed_width: bool = True

    def _of(self, kept: float) -> tuple[float, float]:
        """MACs of all heads and of all groups where ``kept`` tokens, text included, are updated."""
        total, channels = self.image + self.text, self.channels
        attention = 2.0 * (total + kept) * channels**2 + 2.0 * kept * total * channels
        return attention, 2.0 * kept * channels * self.mlp_hidden

    @property
    def complete(self) -> Macs:
        """See `BlockCost`."""
        return Macs(*self._of(self.image + self.text))

    def executed(self, routing: BlockRouting) -> Macs:
        """See `BlockCost`."""
        attention, mlp = self._of(self.text)
        all_attention, all_mlp = self._of(self.image + self.text)
        # Both are linear in the number of kept tokens.
        share = routing.tokens.float().mean(dim=1)
        return Macs(
            routing.heads.float().mean(dim=1) * (attention + (all_attention - attention) * share),
            routing.groups.float().mean(dim=1) * (mlp + (all_mlp - mlp) * share),
        )

    def floor(self, num_heads: int, num_groups: int) -> float:
        """See `BlockCost`."""
        attention, mlp = self._of(self.text)
        return attention / num_heads + mlp / num_groups if self.routed_width else attention + mlp
