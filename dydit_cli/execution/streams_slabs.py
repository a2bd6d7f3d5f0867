"""The parts of two-stream blocks whose weights are sliced, and how each is packed by unit.

diffusers stores q, k and v apart, and the output projection of a single block reads attention and MLP side by side. A part names
the layers of its block when it is asked, so that replaced ones (adapters) are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dydit_cli.execution.effective import effective
from dydit_cli.execution.slabs import Slabs, pack


@dataclass(frozen=True)
class PartLayers:
    """The layers of a part.

    Attributes:
        owner: The module whose buffer the order is.
        order: The stored heads or channels, by rank.
        opening: Layers whose rows belong to units.
        closing: The layer whose columns do, if there is one.
        columns: Which of its columns are this part's; None means all.
    """

    owner: nn.Module
    order: Tensor
    opening: tuple[nn.Module, ...]
    closing: nn.Module | None = None
    columns: slice | None = None


class BlockPart:
    """A part of a block whose weights are sliced by unit.

    Args:
        block: Diffusers' block with routers.
        units: Heads or groups.
        find: Names the part's layers in the block; a function of a module, so that models can be pickled.
    """

    def __init__(self, block: nn.Module, units: int, find: Callable[[Any], PartLayers]) -> None:
        self._block = block
        self._find = find
        self.units = units

    @property
    def layers(self) -> PartLayers:
        """Those of now."""
        return self._find(self._block)

    def modules(self) -> Iterator[nn.Module]:
        """See `SlicedLayer`."""
        layers = self.layers
        yield layers.owner
        for layer in (*layers.opening, layers.closing):
            if layer is not None:
                yield from layer.modules()


def image_heads(block: Any) -> PartLayers:
    """Attention of a double block's image stream."""
    attn = block.attn
    return PartLayers(attn, attn.head_order, (attn.to_q, attn.to_k, attn.to_v), attn.to_out[0])


def text_heads(block: Any) -> PartLayers:
    """Attention of a double block's text stream."""
    attn = block.attn
    opening = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return PartLayers(attn, attn.head_order, opening, attn.to_add_out)


def image_channels(block: Any) -> PartLayers:
    """MLP of a double block's image stream."""
    return PartLayers(block.ff, block.ff.channel_order, (block.ff.net[0].proj,), block.ff.net[2])


def text_channels(block: Any) -> PartLayers:
    """MLP of a double block's text stream."""
    layer = block.ff_context
    return PartLayers(layer, layer.channel_order, (layer.net[0].proj,), layer.net[2])


def single_queries(block: Any) -> PartLayers:
    """Queries and output projection of a single block: what text and kept image tokens alone need."""
    attn = block.attn
    return PartLayers(attn, attn.head_order, (attn.to_q,), block.proj_out, slice(None, attn.inner_dim))


def single_keys_values(block: Any) -> PartLayers:
    """Keys and values of a single block, which all tokens need; nothing closes."""
    attn = block.attn
    return PartLayers(attn, attn.head_order, (attn.to_k, attn.to_v))


def single_channels(block: Any) -> PartLayers:
    """MLP of a single block; its projection's columns follow those of attention."""
    columns = slice(block.attn.inner_dim, None)
    return PartLayers(block, block.channel_order, (block.proj_mlp,), block.proj_out, columns)


@pack.register
def part_slabs(part: BlockPart) -> Slabs:
    """Pack a part: entry is [U, rows, C], the rows of its layers in a unit side by side; leave is [U, rows', C] or has no rows."""
    layers = part.layers
    opened = [effective(layer) for layer in layers.opening]
    entry = torch.cat([by_unit(weight, layers.order, part.units) for weight, _ in opened], dim=1)
    biases = [by_unit(bias[:, None], layers.order, part.units).squeeze(2) for _, bias in opened]
    if layers.closing is None:
        leave, leave_bias = entry.new_empty(part.units, 0, entry.shape[2]), entry.new_zeros(entry.shape[2])
    else:
        weight, leave_bias = effective(layers.closing)
        columns = weight if layers.columns is None else weight[:, layers.columns]
        leave = by_unit(columns.t(), layers.order, part.units)
    return Slabs(entry, torch.cat(biases, dim=1), leave, leave_bias)


def by_unit(rows: Tensor, order: Tensor, units: int) -> Tensor:
    """(R, C) stored rows -> (U, R / U, C) by rank; ``order`` names heads of several rows or single rows."""
    grouped = rows.reshape(len(order), -1, rows.shape[1]).index_select(0, order)
    return grouped.view(units, -1, rows.shape[1])
