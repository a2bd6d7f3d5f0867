"""Where the units of a model's blocks keep their weights in a state dict: what a ranking needs when there is no model.

A unit (a head, a channel of an MLP) has rows in one matrix, which make what it computes, and columns in another, which write that
into the residual stream. Units that two streams share, as the heads of FLUX's double blocks, have several such pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Rows or columns ``start`` to ``stop`` of a matrix; all by default."""

    key: str
    start: int = 0
    stop: int | None = None


class Pair(NamedTuple):
    """The rows that make units' values, and the columns that take them up, in the same order of units."""

    rows: Span
    columns: Span


@dataclass(frozen=True)
class UnitWeights:
    """The units of one kind in one block.

    Attributes:
        order: Key of the buffer that holds their order of importance.
        units: How many there are; rows and columns are cut evenly.
        pairs: Where their weights are; scores of several pairs add up.
        grouped: Whether they are channels, which are switched in groups, and not heads.
    """

    order: str
    units: int
    pairs: tuple[Pair, ...]
    grouped: bool


def dit_units(depth: int, hidden_size: int, num_heads: int, mlp_hidden: int) -> Iterator[UnitWeights]:
    """Of DiT, SiT and the class-conditional Latte, in their stored layout."""
    for index in range(depth):
        block = f"blocks.{index}"
        value = Span(f"{block}.attn.qkv.weight", 2 * hidden_size, 3 * hidden_size)
        heads = Pair(value, Span(f"{block}.attn.proj.weight"))
        channels = Pair(Span(f"{block}.mlp.fc1.weight"), Span(f"{block}.mlp.fc2.weight"))
        yield UnitWeights(f"{block}.attn.head_order", num_heads, (heads,), grouped=False)
        yield UnitWeights(f"{block}.mlp.channel_order", mlp_hidden, (channels,), grouped=True)


def flux_units(
    num_layers: int, num_single_layers: int, hidden_size: int, num_heads: int, mlp_hidden: int
) -> Iterator[UnitWeights]:
    """Of FLUX under diffusers' keys.

    A head of a double block serves both streams: its scores add up. The MLPs of image and text are apart. In a single block the
    columns of ``proj_out`` are those of attention, then those of the MLP.
    """
    for index in range(num_layers):
        block = f"transformer_blocks.{index}"
        image = Pair(Span(f"{block}.attn.to_v.weight"), Span(f"{block}.attn.to_out.0.weight"))
        text = Pair(Span(f"{block}.attn.add_v_proj.weight"), Span(f"{block}.attn.to_add_out.weight"))
        yield UnitWeights(f"{block}.attn.head_order", num_heads, (image, text), grouped=False)
        for name in ("ff", "ff_context"):
            channels = Pair(Span(f"{block}.{name}.net.0.proj.weight"), Span(f"{block}.{name}.net.2.weight"))
            yield UnitWeights(f"{block}.{name}.channel_order", mlp_hidden, (channels,), grouped=True)
    for index in range(num_single_layers):
        block = f"single_transformer_blocks.{index}"
        output = f"{block}.proj_out.weight"
        heads = Pair(Span(f"{block}.attn.to_v.weight"), Span(output, 0, hidden_size))
        channels = Pair(Span(f"{block}.proj_mlp.weight"), Span(output, hidden_size))
        yield UnitWeights(f"{block}.attn.head_order", num_heads, (heads,), grouped=False)
        yield UnitWeights(f"{block}.channel_order", mlp_hidden, (channels,), grouped=True)
