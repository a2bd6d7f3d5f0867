"""A block of DiT's form that was cut to a width of its own: so many heads, so many hidden channels, no routers.

It is static: everything that is left runs at every timestep, for every token, whichever executor asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.layers import WHOLE, DynamicAttention, DynamicMlp, Sequences
from dydit_cli.dynamic.routing import Decisions
from dydit_cli.errors import DyditError
from dydit_cli.execution.compiled import CompiledStaticExecutor
from dydit_cli.execution.interface import (
    BlockWidth,
    BranchModulation,
    DynamicBlock,
    Executor,
    add_gated,
    attention_with,
    mlp_with,
    modulated,
)
from dydit_cli.families.blocks import NORM_EPS, branch_modulation


class PrunedDiTBlock(nn.Module):
    """An adaLN-Zero block with fewer heads and hidden channels than the model that it was cut from.

    Masks keep that model's sizes, all ones: the rest of the package sees a model that has everything on.

    Args:
        hidden_size: C.
        head_dim: C_h, as it was.
        num_heads: Heads that are left.
        mlp_hidden: Hidden channels that are left.
        mask_heads: H of the model that it was cut from.
        mask_groups: G of that model.
        sequences: Which tokens attend to each other.
    """

    token_router = None

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        mlp_hidden: int,
        mask_heads: int,
        mask_groups: int,
        sequences: Sequences = WHOLE,
    ) -> None:
        super().__init__()
        self.masks = (mask_heads, mask_groups)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = DynamicAttention(hidden_size, num_heads, sequences, head_dim)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.mlp = DynamicMlp(hidden_size, mlp_hidden, 1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def decide_width(self, time_embedding: Tensor, gating: Gating, index: int) -> BlockWidth:
        """See `RoutedBlock`: there is nothing to decide."""
        return self.complete_width(time_embedding)

    def complete_width(self, time_embedding: Tensor) -> BlockWidth:
        """See `RoutedBlock`."""
        ones = time_embedding.new_ones(len(time_embedding), 1)
        heads, groups = self.masks
        return BlockWidth(ones.expand(-1, heads), ones.expand(-1, groups))

    def sliced_layers(self) -> tuple[tuple[nn.Module, int], ...]:
        """See `RoutedBlock`: what was sliced, was sliced for good."""
        return ()

    def reset_routers(self) -> None:
        """There are none."""

    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor | None,
        width: BlockWidth,
        executor: Executor,
        gating: Gating,
        index: int,
        decisions: Decisions,
        modulation: BranchModulation | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """See `DynamicDiTBlock`; every token enters the MLP."""
        if modulation is None:
            modulation = branch_modulation(self.adaLN_modulation, condition)
        tokens = hidden_states if offset is None else hidden_states + offset
        decisions.note(index, tokens.new_ones(1, 1).expand(tokens.shape[0], tokens.shape[1]))
        if isinstance(executor, CompiledStaticExecutor):
            # The static graph reads attention and MLP alone, so that it does not miss the routers.
            done = executor.run_block(cast(DynamicBlock, self), tokens, modulation, width, gating, index)
            if done is not None:
                return done[0]
        attention, mlp = modulation
        inputs = modulated(self.norm1(tokens), attention.shift[:, None], attention.scale[:, None])
        tokens = add_gated(
            tokens, attention.gate[:, None], attention_with(self.attn, inputs, None, width.time)
        )
        inputs = modulated(self.norm2(tokens), mlp.shift[:, None], mlp.scale[:, None])
        return add_gated(tokens, mlp.gate[:, None], mlp_with(self.mlp, inputs, None, width.time))


def check_pruned(
    block_heads: Sequence[int] | None,
    block_hidden: Sequence[int] | None,
    *,
    depth: int,
    num_heads: int,
    mlp_hidden: int,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The widths of a pruned model's blocks, or None for a model that was not pruned.

    Raises:
        DyditError: If they do not fit the model that it was cut from.
    """
    if block_heads is None and block_hidden is None:
        return None
    heads, hidden = tuple(block_heads or ()), tuple(block_hidden or ())
    fits = (
        len(heads) == len(hidden) == depth
        and all(1 <= count <= num_heads for count in heads)
        and all(1 <= count <= mlp_hidden for count in hidden)
    )
    if not fits:
        raise DyditError(
            "The widths of the pruned blocks do not fit the model.",
            why=f"block_heads and block_hidden need one number a block, {depth} each, from 1 to {num_heads} and {mlp_hidden}.",
            fix="Load the folder as `dydit convert --prune` wrote it.",
        )
    return heads, hidden
