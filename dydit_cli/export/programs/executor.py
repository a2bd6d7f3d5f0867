"""Execution that can be traced: the decisions stay on the device, and what depends on them has sizes that are symbols.

Compact execution reads masks on the host and branches on what it finds there, which a graph cannot. Here a mask becomes indices
(`nonzero`), indices choose weights and tokens (`index_select`), and updates are added where they belong (`index_add`), whatever
their number is, none included. All samples of a batch share one timestep, as in every sampler, and so one width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.routers import TokenRouter
from dydit_cli.execution.interface import (
    BlockWidth,
    DynamicBlock,
    Modulation,
    RoutedBlock,
    add_gated,
    live_widths,
    modulated,
)
from dydit_cli.execution.slices import Slice, closed, entered
from dydit_cli.execution.units import SlicedLayer
from dydit_cli.export.programs.streams import ProgramStreams, through_kept
from dydit_cli.export.programs.weights import UnitWeights, active_units

Deciding = Callable[[Sequence[RoutedBlock], Tensor, Gating], Sequence[BlockWidth]]
"""Blocks, (1, C) timestep embedding, gating -> widths of one row."""


class ProgramExecutor(ProgramStreams):
    """Gathers the weights of active units and the tokens that are kept, without asking the host.

    Args:
        weights: By the identity of each sliced layer.
        decide: The widths of all blocks; the routers are asked if not given.
    """

    name = "program"

    def __init__(self, weights: Mapping[int, UnitWeights], decide: Deciding = live_widths) -> None:
        self._weights = weights
        self._decide = decide

    def active(self, layer: SlicedLayer, units: Tensor) -> Slice:
        """See `ProgramStreams`."""
        return self._weights[id(layer)].of(units)

    def widths(
        self, blocks: Sequence[RoutedBlock], timestep: Tensor, time_embedding: Tensor, gating: Gating
    ) -> Sequence[BlockWidth]:
        """See `Executor`; the first sample's timestep is that of all."""
        return self._decide(blocks, time_embedding[:1], gating)

    def attend(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth
    ) -> Tensor:
        """See `Executor`."""
        weights = self.active(block.attn, active_units(width.heads))
        inputs = modulated(block.norm1(tokens), modulation.shift[:, None], modulation.scale[:, None])
        qkv = entered(inputs, weights).unflatten(-1, (weights.units, 3, block.attn.head_dim))
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        mixed = block.attn.sequences.attend(query, key, value)
        return add_gated(tokens, modulation.gate[:, None], closed(mixed.transpose(1, 2).flatten(2), weights))

    def select(self, router: TokenRouter, tokens: Tensor, gating: Gating, block: int) -> Tensor:
        """See `Executor`."""
        return gating.tokens(block, router(tokens))

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """See `Executor`."""
        weights = self.active(block.mlp, active_units(width.groups))
        return through_kept(tokens, keep, block.norm2, modulation, weights)
