"""The block of the text-to-video Latte: self-attention, in spatial blocks cross-attention to the prompt, and an MLP.

One adaLN layer serves all blocks (PixArt's "adaLN-single", Chen et al., arXiv 2310.00426): a block adds a table of its own.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.routers import TokenRouter, width_routers
from dydit_cli.dynamic.routing import Decisions
from dydit_cli.execution.interface import BlockWidth, DynamicBlock, Executor, Modulation
from dydit_cli.families.split_layers import AlongFrames, InsideFrames, SplitAttention, SplitMlp


class CrossAttention(nn.Module):
    """Attention of the tokens to a prompt, with diffusers' keys; static.

    All frames of a video have one prompt, so that its keys and values are computed once a video, where diffusers' class computes
    them once a frame: the same result.

    Args:
        hidden_size: C, of tokens and projected prompt.
        num_heads: H; divides C.
        bias: Whether queries, keys and values have a bias.
    """

    def __init__(self, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_v = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])

    def forward(self, tokens: Tensor, prompt: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) tokens, (B, L, C) prompt and its mask, if any, of a shape that expands to (B, 1, T, L) -> (B, T, C)."""
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.to_q(tokens), self.to_k(prompt), self.to_v(prompt))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        update: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return update


class DynamicLatteT2VBlock(nn.Module):
    """A block whose heads, MLP groups and MLP tokens are dynamic; cross-attention, where it has one, is not.

    Tokens of a video stand in one row, frame after frame. Widths are decided from the timestep embedding alone. The token router
    reads the stream that the MLP would read: after self-attention and, in a spatial block, after cross-attention. (Ours: the
    method's papers know no cross-attention; a token's need of an MLP is judged by what the MLP would see.)

    Args:
        hidden_size: C. num_heads: H. mlp_hidden: Hidden channels of the MLP. num_groups: G.
        always_on: Whether the first head and group have no router row and are always on.
        places: N, tokens of a frame.
        temporal: Whether tokens attend along the frames, and not to the prompt.
        bias: Whether queries, keys and values have a bias.
        norm_eps: Of LayerNorm.
        width: ``free`` or ``ordered``; see `width_routers`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_hidden: int,
        num_groups: int,
        always_on: bool,
        *,
        places: int,
        temporal: bool,
        bias: bool,
        norm_eps: float,
        width: str = "free",
    ) -> None:
        super().__init__()
        sequences = AlongFrames(places) if temporal else InsideFrames(places)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.attn1 = SplitAttention(hidden_size, num_heads, sequences, bias)
        self.attn2 = None if temporal else CrossAttention(hidden_size, num_heads, bias)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.ff = SplitMlp(hidden_size, mlp_hidden, num_groups)
        for_heads, for_groups = width_routers(width)
        self.head_router = for_heads(hidden_size, num_heads, always_on)
        self.channel_router = for_groups(hidden_size, num_groups, always_on)
        self.token_router = TokenRouter(hidden_size)

    @property
    def attn(self) -> SplitAttention:
        """The dynamic attention, by the name that executors and rankings know."""
        return self.attn1

    @property
    def mlp(self) -> SplitMlp:
        """The dynamic MLP, by the name that executors and rankings know."""
        return self.ff

    def decide_width(self, time_embedding: Tensor, gating: Gating, index: int) -> BlockWidth:
        """See `RoutedBlock`."""
        heads, groups = self.head_router, self.channel_router
        return BlockWidth(
            heads.complete(gating.heads(index, heads(time_embedding))),
            groups.complete(gating.groups(index, groups(time_embedding))),
        )

    def complete_width(self, time_embedding: Tensor) -> BlockWidth:
        """See `RoutedBlock`."""
        ones = time_embedding.new_ones(len(time_embedding), 1)
        return BlockWidth(ones.expand(-1, self.head_router.units), ones.expand(-1, self.channel_router.units))

    def sliced_layers(self) -> tuple[tuple[nn.Module, int], ...]:
        """See `RoutedBlock`."""
        return (self.attn1, 0), (self.ff, 1)

    def value_and_output_weights(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """See `DynamicDiTBlock`."""
        return ((self.attn1.to_v.weight, self.attn1.to_out.get_parameter("0.weight")),)

    def reset_routers(self) -> None:
        """Give the routers the paper's start: xavier weights, biases at which everything is on."""
        for router in (self.head_router, self.channel_router, self.token_router):
            router.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        shared: Tensor,
        prompt: Tensor,
        mask: Tensor | None,
        width: BlockWidth,
        executor: Executor,
        gating: Gating,
        index: int,
        decisions: Decisions,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden_states: (B, F * N, C) tokens.
            shared: (B, 6, C), the values that the shared adaLN layer gives to all blocks.
            prompt: (B, L, C).
            mask: Of the prompt; see `CrossAttention`.
            width: Of this block.
            executor: How masks become arithmetic.
            gating: How logits become masks.
            index: Number of the block.
            decisions: Gets the (B, F * N) mask of the tokens that entered the MLP.
            offset: (1, F * N, C), added to the tokens first; see `DynamicDiTBlock`.

        Returns:
            (B, F * N, C) tokens.
        """
        values = (self.scale_shift_table + shared).unbind(1)
        # Its layers answer to the names of those that executors were written for.
        block = cast(DynamicBlock, self)
        tokens = hidden_states if offset is None else hidden_states + offset
        tokens = executor.attend(block, tokens, Modulation(*values[:3]), width)
        if self.attn2 is not None:
            tokens = tokens + self.attn2(tokens, prompt, mask)
        keep = executor.select(self.token_router, tokens, gating, index)
        decisions.note(index, keep)
        return executor.feed_forward(block, tokens, Modulation(*values[3:]), width, keep)
