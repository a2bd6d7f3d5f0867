"""Give the stored weights of sliced layers back once they are packed: inference then holds them once, not twice.

The slabs that compact execution reads are the stored weights in another order, so nothing is lost: `restore_weights` puts every bit
back. Meanwhile the parameters stand there without memory (on torch's "meta" device), with their names, shapes and types; whatever
would need their values must be refused, because it would get none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dydit_cli.errors import DyditError
from dydit_cli.execution.effective import is_adapted
from dydit_cli.execution.quantised import int8_rows, is_quantised, with_values
from dydit_cli.execution.slabs import FreedWeights, freed_of
from dydit_cli.execution.units import Slabs, SlicedLayer, UnitLayers, from_units, pack, unit_layers

Place = tuple[nn.Module, str]
"""A module and the name of one of its parameters."""


def stored_weights(parts: Iterable[tuple[UnitLayers, Slabs]]) -> dict[Place, Tensor]:
    """The inverse of `pack`: what slabs in the order of ranks hold, as stored.

    Parts may share a layer that closes them (each has some of its columns), and together have all of it.
    """
    found: dict[Place, Tensor] = {}
    columns: dict[nn.Module, list[tuple[int, Tensor]]] = {}
    for part, slabs in parts:
        for layer, rows in zip(part.opening, rows_of_layers(part, slabs.entry), strict=True):
            found[layer, "weight"] = rows_as_stored(part, rows)
        for layer, rows in zip(part.opening, rows_of_layers(part, slabs.entry_bias[:, :, None]), strict=True):
            if layer.bias is not None:
                found[layer, "bias"] = rows_as_stored(part, rows).squeeze(1)
        if part.closing is not None:
            start = 0 if part.columns is None else part.columns.start or 0
            values = from_units(slabs.leave, part.order).t()
            columns.setdefault(part.closing, []).append((start, values))
    for layer, pieces in columns.items():
        together = [values for _, values in sorted(pieces, key=lambda piece: piece[0])]
        found[layer, "weight"] = together[0] if len(together) == 1 else torch.cat(together, dim=1)
    return found


def rows_of_layers(part: UnitLayers, rows: Tensor) -> Iterator[Tensor]:
    """Cut (U, rows, X) into what belongs to each opening layer, which lie side by side in a unit."""
    heights = [len(layer.get_parameter("weight")) // part.units for layer in part.opening]
    return iter(rows.split(heights, dim=1))


def rows_as_stored(part: UnitLayers, rows: Tensor) -> Tensor:
    """(U, R / U, X) by rank -> (R, X) as an opening layer stores them."""
    kinds = rows.chunk(part.kinds, dim=1)
    return torch.cat([from_units(kind.contiguous(), part.order) for kind in kinds])


def free_weights(layers: Sequence[SlicedLayer]) -> None:
    """Pack the sliced layers of a block and give their stored weights back; those that are freed already stay so.

    Args:
        layers: All that share linear layers.

    Raises:
        DyditError: If slabs do not hold the stored weights bit for bit, as under an adapter, or if a gradient is wanted.
    """
    layers = [layer for layer in layers if freed_of(layer) is None]
    with torch.inference_mode(False), torch.no_grad():
        parts = [(unit_layers(layer), pack(layer)) for layer in layers]
        modules = {
            module for part, _ in parts for module in (*part.opening, part.closing) if module is not None
        }
        if not all(isinstance(module, nn.Linear) and not is_adapted(module) for module in modules):
            raise _adapted()
        found = stored_weights(parts)
        stored = {(module, name): module.get_parameter(name) for module, name in found}
        if not all(same_bits(tensor, values_of(stored[place])) for place, tensor in found.items()):
            raise _adapted()
        if any(parameter.requires_grad for parameter in stored.values()):
            raise DyditError(
                "Weights that are being trained cannot be freed.",
                why="Their gradients belong to the stored weights.",
                fix="Call model.requires_grad_(False) first if the model is only to be run.",
            )
        for (module, name), tensor in found.items():
            _put(module, name, torch.empty_like(tensor, device="meta"))
        for layer, (part, slabs) in zip(layers, parts, strict=True):
            freed = FreedWeights(slabs, tuple(range(part.units)), part, part.order.clone())
            layer.freed_weights = freed  # type: ignore[attr-defined]


def restore_weights(layers: Sequence[SlicedLayer]) -> None:
    """Put the stored weights of a block's sliced layers back, bit for bit; nothing happens if they are there."""
    layers = [layer for layer in layers if freed_of(layer) is not None]
    held = [freed for layer in layers if (freed := freed_of(layer)) is not None]
    with torch.inference_mode(False), torch.no_grad():
        found = stored_weights((freed.part, freed.by_rank()) for freed in held)
        for (module, name), tensor in found.items():
            _put(module, name, tensor.contiguous())
        for layer in layers:
            del layer.freed_weights  # type: ignore[attr-defined]


def values_of(stored: Tensor) -> Tensor:
    """What slabs hold of a stored weight: its numbers, or those in int8 that torchao multiplies with scales."""
    held = int8_rows(stored)
    return stored if held is None else held[0]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in every bit, NaN and the sign of zero included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def _adapted() -> DyditError:
    return DyditError(
        "Weights that an adapter changes cannot be freed.",
        why="What is packed is not what is stored, so that the stored weights could not be put back.",
        fix="Remove the adapter or merge it into the weights first, or call model.pack() without free=True.",
    )


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    stored = module.get_parameter(name)
    if is_quantised(stored):
        values = with_values(stored, values)
    setattr(module, name, nn.Parameter(values, requires_grad=False))
