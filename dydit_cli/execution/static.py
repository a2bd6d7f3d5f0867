"""Static execution: the complete model, routers not even asked. The baseline of every comparison and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.routers import TokenRouter
from dydit_cli.execution.interface import (
    BlockWidth,
    DynamicBlock,
    Modulation,
    RoutedBlock,
    attention_with,
    mlp_with,
    modulate,
)
from dydit_cli.execution.streams_dense import StaticStreams


class StaticExecutor(StaticStreams):
    """Runs all units and pays nothing for routing."""

    name = "static"

    def widths(
        self, blocks: Sequence[RoutedBlock], timestep: Tensor, time_embedding: Tensor, gating: Gating
    ) -> Sequence[BlockWidth]:
        """See `Executor`."""
        return [replace(block.complete_width(time_embedding), time=time_embedding) for block in blocks]

    def attend(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth
    ) -> Tensor:
        """See `Executor`."""
        inputs = modulate(block.norm1(tokens), modulation.shift[:, None], modulation.scale[:, None])
        return tokens + modulation.gate[:, None] * attention_with(block.attn, inputs, None, width.time)

    def select(self, router: TokenRouter, tokens: Tensor, gating: Gating, block: int) -> Tensor:
        """See `Executor`."""
        return tokens.new_ones(1, 1).expand(tokens.shape[0], tokens.shape[1])

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """See `Executor`."""
        inputs = modulate(block.norm2(tokens), modulation.shift[:, None], modulation.scale[:, None])
        return tokens + modulation.gate[:, None] * mlp_with(block.mlp, inputs, None, width.time)
