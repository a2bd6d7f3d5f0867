"""Weights of a program: those of heads and channel groups once, by unit, so that the active ones are gathered by index.

The slabs are those of compact execution (`execution/units.py`): a unit's rows follow each other in memory, and gathering them is one
`index_select` a weight. The layers that they came from are left without parameters, so that a program holds every weight once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dydit_cli.execution.interface import RoutedBlock
from dydit_cli.execution.slices import Slice
from dydit_cli.execution.units import SlicedLayer, pack, unit_layers

WEIGHTS = "unit_weights"
"""Where a block keeps the weights of its units."""


class UnitWeights(nn.Module):
    """The slabs of a layer, as buffers.

    Args:
        layer: Whose weights are packed; they stay where they are.
    """

    entry: Tensor
    entry_bias: Tensor
    leave: Tensor
    leave_bias: Tensor

    def __init__(self, layer: SlicedLayer) -> None:
        super().__init__()
        slabs = pack(layer)
        for name in ("entry", "entry_bias", "leave", "leave_bias"):
            self.register_buffer(name, getattr(slabs, name).detach().contiguous())

    def of(self, units: Tensor) -> Slice:
        """The weights of the (k,) ``units``."""
        entry, bias, leave = (
            part.index_select(0, units).flatten(0, 1) for part in (self.entry, self.entry_bias, self.leave)
        )
        return Slice(units.shape[0], entry, bias, leave, self.leave_bias)


def move_weights(blocks: Sequence[RoutedBlock]) -> dict[int, UnitWeights]:
    """Pack the sliced layers of all blocks and take the parameters out of the layers that they came from.

    Returns:
        The packed weights by the identity of the sliced layer. Each block holds its own, so that they are part of the model.
    """
    found: dict[int, UnitWeights] = {}
    with torch.no_grad():
        for block in blocks:
            layers = [layer for layer, _ in block.sliced_layers()]
            emptied = [linear for layer in layers for linear in linears_of(layer)]
            weights = [UnitWeights(layer) for layer in layers]
            found |= {id(layer): weight for layer, weight in zip(layers, weights, strict=True)}
            if isinstance(block, nn.Module):
                block.add_module(WEIGHTS, nn.ModuleList(weights))
            for linear in emptied:
                for name in list(linear._parameters):
                    delattr(linear, name)
    return found


def active_units(mask: Tensor) -> Tensor:
    """(1, U) mask -> (k,) ranks of the units that are on."""
    return mask[0].nonzero().squeeze(1)


def linears_of(layer: SlicedLayer) -> list[nn.Module]:
    """The linear layers whose weights are packed; some may belong to another part too."""
    parts = unit_layers(layer)
    return [linear for linear in (*parts.opening, parts.closing) if linear is not None]
