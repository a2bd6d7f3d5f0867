"""Dense execution: everything is computed and multiplied by masks. Slower than static, and the only one with gradients to routers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.routers import TokenRouter
from dydit_cli.execution.interface import (
    BlockWidth,
    DynamicBlock,
    Modulation,
    RoutedBlock,
    attention_with,
    live_widths,
    mlp_with,
    modulate,
)
from dydit_cli.execution.streams_dense import DenseStreams


class DenseExecutor(DenseStreams):
    """Multiplies by masks. With all units on, it is the static model bit for bit: a product with one is exact."""

    name = "dense"

    def widths(
        self, blocks: Sequence[RoutedBlock], timestep: Tensor, time_embedding: Tensor, gating: Gating
    ) -> Sequence[BlockWidth]:
        """See `Executor`."""
        return live_widths(blocks, time_embedding, gating)

    def attend(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth
    ) -> Tensor:
        """See `Executor`. The bias of the output projection stays, so that slicing gives the same."""
        inputs = modulate(block.norm1(tokens), modulation.shift[:, None], modulation.scale[:, None])
        return tokens + modulation.gate[:, None] * attention_with(
            block.attn, inputs, block.attn.by_source(width.heads), width.time
        )

    def select(self, router: TokenRouter, tokens: Tensor, gating: Gating, block: int) -> Tensor:
        """See `Executor`."""
        return gating.tokens(block, router(tokens))

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """See `Executor`."""
        inputs = modulate(block.norm2(tokens), modulation.shift[:, None], modulation.scale[:, None])
        update = mlp_with(block.mlp, inputs, block.mlp.by_source(width.groups), width.time)
        return tokens + keep.to(tokens.dtype)[:, :, None] * (modulation.gate[:, None] * update)
