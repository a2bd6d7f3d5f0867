"""The parts of two-stream blocks whose weights are sliced, and how each is packed by unit.

diffusers stores q, k and v apart, and the output projection of a single block reads attention and MLP side by side. A part names
the layers of its block when it is asked, so that replaced ones (adapters) are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dydit_cli.execution.units import UnitLayers, unit_layers


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


@unit_layers.register
def units_of_part(part: BlockPart) -> UnitLayers:
    """Heads or groups of a part."""
    layers = part.layers
    return UnitLayers(part.units, layers.order, layers.opening, layers.closing, columns=layers.columns)
