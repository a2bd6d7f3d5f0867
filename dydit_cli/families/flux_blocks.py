"""diffusers' two FLUX blocks with routers: their parameters keep their names, routers and orders stand beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.routers import ChannelRouter, HeadRouter, WidthRouter, width_routers
from dydit_cli.dynamic.routing import Decisions
from dydit_cli.dynamic.stream_routers import FullTokenRouter, LowRankTokenRouter
from dydit_cli.execution.interface import BlockWidth
from dydit_cli.execution.streams import Rope, StreamCall, StreamExecutor
from dydit_cli.execution.streams_slabs import (
    BlockPart,
    image_channels,
    image_heads,
    single_channels,
    single_keys_values,
    single_queries,
    text_channels,
    text_heads,
)


@dataclass(frozen=True)
class FluxBlockShape:
    """What the blocks of a FLUX model have in common.

    Attributes:
        hidden_size: C. num_heads: H. mlp_hidden: Hidden channels of an MLP. num_groups: G.
        always_on: Whether the first head and group have no router row and are always on.
        width: ``free`` or ``ordered`` (see `width_routers`), or None: heads and groups have no routers and are all on.
        full_token_router: Whether the token router is the authors'.
        token_rank: Rank of ours; None means the usual one.
    """

    hidden_size: int
    num_heads: int
    mlp_hidden: int
    num_groups: int
    always_on: bool
    width: str | None
    full_token_router: bool
    token_rank: int | None

    def token_router(self) -> FullTokenRouter | LowRankTokenRouter:
        """A token router."""
        if self.full_token_router:
            return FullTokenRouter(self.hidden_size)
        return LowRankTokenRouter(self.hidden_size, self.token_rank)

    def head_router(self) -> HeadRouter | None:
        """A router of heads."""
        if self.width is None:
            return None
        return width_routers(self.width)[0](self.hidden_size, self.num_heads, self.always_on)

    def channel_router(self) -> ChannelRouter | None:
        """A router of channel groups."""
        if self.width is None:
            return None
        return width_routers(self.width)[1](self.hidden_size, self.num_groups, self.always_on)

    def feed_forward(self) -> FeedForward:
        """An MLP with an order of its channels."""
        layer = FeedForward(
            self.hidden_size,
            dim_out=self.hidden_size,
            inner_dim=self.mlp_hidden,
            activation_fn="gelu-approximate",
        )
        layer.register_buffer("channel_order", torch.arange(self.mlp_hidden))
        return layer


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by the backend that the user has chosen for diffusers; see `StreamBlock`."""
    mixed: Tensor = dispatch_attention_fn(query, key, value, backend=attention.processor._attention_backend)
    return mixed


def decided(
    router: WidthRouter | None,
    decide: Callable[[int, Tensor], Tensor],
    index: int,
    time_embedding: Tensor,
    units: int,
) -> Tensor:
    """The (B, units) mask of a router, by one method of a gating; ones where there is no router."""
    if router is None:
        return time_embedding.new_ones(1, 1, dtype=torch.float32).expand(len(time_embedding), units)
    return router.complete(decide(index, router(time_embedding)))


def reset(*routers: WidthRouter | FullTokenRouter | LowRankTokenRouter | None) -> None:
    """Give routers their start, at which everything is on."""
    for router in routers:
        if router is not None:
            router.reset_parameters()


class DynamicFluxBlock(FluxTransformerBlock):
    """A block of two streams whose heads (shared), MLP groups (of either stream) and image tokens are dynamic."""

    def __init__(self, shape: FluxBlockShape) -> None:
        super().__init__(shape.hidden_size, shape.num_heads, shape.hidden_size // shape.num_heads)
        self.shape = shape
        self.ff = shape.feed_forward()
        self.ff_context = shape.feed_forward()
        self.attn.register_buffer("head_order", torch.arange(shape.num_heads))
        self.head_router = shape.head_router()
        self.channel_router = shape.channel_router()
        self.context_channel_router = shape.channel_router()
        self.token_router = shape.token_router()
        self.image_heads = BlockPart(self, shape.num_heads, image_heads)
        self.text_heads = BlockPart(self, shape.num_heads, text_heads)
        self.image_channels = BlockPart(self, shape.num_groups, image_channels)
        self.text_channels = BlockPart(self, shape.num_groups, text_channels)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `StreamBlock`."""
        return attend(self.attn, query, key, value)

    def decide_width(self, time_embedding: Tensor, gating: Gating, index: int) -> BlockWidth:
        """See `RoutedBlock`."""
        shape = self.shape
        return BlockWidth(
            decided(self.head_router, gating.heads, index, time_embedding, shape.num_heads),
            decided(self.channel_router, gating.groups, index, time_embedding, shape.num_groups),
            decided(
                self.context_channel_router, gating.context_groups, index, time_embedding, shape.num_groups
            ),
        )

    def complete_width(self, time_embedding: Tensor) -> BlockWidth:
        """See `RoutedBlock`."""
        ones = time_embedding.new_ones(len(time_embedding), 1)
        groups = ones.expand(-1, self.shape.num_groups)
        return BlockWidth(ones.expand(-1, self.shape.num_heads), groups, groups)

    def sliced_layers(self) -> tuple[tuple[BlockPart, int], ...]:
        """See `RoutedBlock`. The heads of both streams follow one mask."""
        return (self.image_heads, 0), (self.image_channels, 1), (self.text_heads, 0), (self.text_channels, 2)

    def reset_routers(self) -> None:
        """Give the routers their start."""
        reset(self.head_router, self.channel_router, self.context_channel_router, self.token_router)

    def complete_forward(
        self, image: Tensor, text: Tensor, conditioning: Tensor, rope: Rope, keywords: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """See `DoubleBlock`."""
        done: tuple[Tensor, Tensor] = super().forward(image, text, conditioning, rope, keywords)
        return done

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rope,
        joint_attention_kwargs: dict[str, Any] | None,
        width: BlockWidth,
        executor: StreamExecutor,
        gating: Gating,
        index: int,
        decisions: Decisions,
    ) -> tuple[Tensor, Tensor]:
        """diffusers' arguments, then how to run -> image and text tokens; ``decisions`` gets the mask of those not skipped."""
        arguments = (hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        call = StreamCall(*arguments, width, gating, index, joint_attention_kwargs)
        image, text, keep = executor.double(self, call)
        decisions.note(index, keep)
        return image, text


class DynamicFluxSingleBlock(FluxSingleTransformerBlock):
    """A block of one joined stream whose heads, MLP groups and image tokens are dynamic."""

    def __init__(self, shape: FluxBlockShape) -> None:
        hidden = shape.hidden_size
        super().__init__(hidden, shape.num_heads, hidden // shape.num_heads)
        self.shape = shape
        if shape.mlp_hidden != 4 * hidden:
            self.mlp_hidden_dim = shape.mlp_hidden
            self.proj_mlp = nn.Linear(hidden, shape.mlp_hidden)
            self.proj_out = nn.Linear(hidden + shape.mlp_hidden, hidden)
        self.attn.register_buffer("head_order", torch.arange(shape.num_heads))
        self.register_buffer("channel_order", torch.arange(shape.mlp_hidden))
        self.head_router = shape.head_router()
        self.channel_router = shape.channel_router()
        self.token_router = shape.token_router()
        self.queries = BlockPart(self, shape.num_heads, single_queries)
        self.keys_values = BlockPart(self, shape.num_heads, single_keys_values)
        self.channels = BlockPart(self, shape.num_groups, single_channels)

    channel_order: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `StreamBlock`."""
        return attend(self.attn, query, key, value)

    def decide_width(self, time_embedding: Tensor, gating: Gating, index: int) -> BlockWidth:
        """See `RoutedBlock`."""
        shape = self.shape
        return BlockWidth(
            decided(self.head_router, gating.heads, index, time_embedding, shape.num_heads),
            decided(self.channel_router, gating.groups, index, time_embedding, shape.num_groups),
        )

    def complete_width(self, time_embedding: Tensor) -> BlockWidth:
        """See `RoutedBlock`."""
        ones = time_embedding.new_ones(len(time_embedding), 1)
        return BlockWidth(ones.expand(-1, self.shape.num_heads), ones.expand(-1, self.shape.num_groups))

    def sliced_layers(self) -> tuple[tuple[BlockPart, int], ...]:
        """See `RoutedBlock`."""
        return (self.queries, 0), (self.keys_values, 0), (self.channels, 1)

    def reset_routers(self) -> None:
        """Give the routers their start."""
        reset(self.head_router, self.channel_router, self.token_router)

    def complete_forward(
        self, image: Tensor, text: Tensor, conditioning: Tensor, rope: Rope, keywords: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """See `SingleBlock`."""
        done: tuple[Tensor, Tensor] = super().forward(image, text, conditioning, rope, keywords)
        return done

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rope,
        joint_attention_kwargs: dict[str, Any] | None,
        width: BlockWidth,
        executor: StreamExecutor,
        gating: Gating,
        index: int,
        decisions: Decisions,
    ) -> tuple[Tensor, Tensor]:
        """diffusers' arguments, then how to run -> image and text tokens; ``decisions`` gets the mask of those not skipped."""
        arguments = (hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        call = StreamCall(*arguments, width, gating, index, joint_attention_kwargs)
        image, text, keep = executor.single(self, call)
        decisions.note(index, keep)
        return image, text
