"""What the routers decided: the masks of one forward pass, by rank of importance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockRouting:
    """The decisions of one block, as 0/1 values (with a straight-through gradient while training).

    Attributes:
        heads: (B, H), by rank: index 0 is the most important head.
        groups: (B, G), by rank.
        tokens: (B, N), in the order of the tokens.
        context_groups: (B, G) of the text stream's own MLP, in blocks that have one.
    """

    heads: Tensor
    groups: Tensor
    tokens: Tensor
    context_groups: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockRouting:
        """Apply ``function`` to each mask."""
        context = self.context_groups
        return BlockRouting(
            function(self.heads),
            function(self.groups),
            function(self.tokens),
            None if context is None else function(context),
        )


class Decisions:
    """Where the blocks of one forward pass leave their token masks, so that they return tokens alone, as diffusers' blocks do.

    What hooks a block may then answer in its place. A block that did not run has left no mask. (No container that is looked into
    where arguments of modules are cast or moved: those would hand the block a copy.)
    """

    def __init__(self) -> None:
        self._tokens: dict[int, Tensor] = {}

    def note(self, index: int, tokens: Tensor) -> None:
        """Leave the (B, N) mask of block number ``index``."""
        self._tokens[index] = tokens

    def ran(self, index: int) -> bool:
        """Whether block number ``index`` ran."""
        return index in self._tokens

    def tokens(self, index: int, like: Tensor) -> Tensor:
        """(B, N) mask of a block; zeros for (B, N, C) tokens of one that did not run."""
        found = self._tokens.get(index)
        return like.new_zeros(like.shape[:2]) if found is None else found


@dataclass(frozen=True)
class Routing:
    """The decisions of all blocks in one forward pass."""

    blocks: tuple[BlockRouting, ...]

    @property
    def heads(self) -> Tensor:
        """(B, L, H) masks of the attention heads."""
        return torch.stack([block.heads for block in self.blocks], dim=1)

    @property
    def groups(self) -> Tensor:
        """(B, L, G) masks of the MLP channel groups."""
        return torch.stack([block.groups for block in self.blocks], dim=1)

    @property
    def tokens(self) -> Tensor:
        """(B, L, N) masks of the tokens that enter the MLP."""
        return torch.stack([block.tokens for block in self.blocks], dim=1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Routing:
        """Apply ``function`` to each mask of each block."""
        return Routing(tuple(block.map(function) for block in self.blocks))

    def detach(self) -> Routing:
        """The same decisions without their gradients."""
        return self.map(torch.Tensor.detach)

    def cpu(self) -> Routing:
        """The same decisions on the CPU."""
        return self.map(torch.Tensor.cpu)
