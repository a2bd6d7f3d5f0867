"""Weights of a dynamic layer as slabs, one a unit, sorted by rank: what compact execution slices.

A head or channel group is one contiguous slab, so that a mask that is a prefix costs nothing (a view) and any other mask is one
`index_select` per weight. Slabs are a copy beside the stored parameters, which keep the source's order; they carry the version
and a few values of their source, and are packed again when it changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dydit_cli.dynamic.layers import DynamicAttention, DynamicMlp
from dydit_cli.errors import DyditError

Stamp = tuple[Hashable, ...]

PROBE_VALUES = 32


def stamp_of(module: nn.Module) -> Stamp:
    """Identify the present values of a module's tensors: storage, in-place version and dtype of each.

    Loading, casting, moving and editing in place change one of these. A weak reference names the storage, because an address
    is given to another tensor once its owner is gone. Writing through ``.data`` changes none: see `probe_of`. Tensors made
    under inference mode have no version.
    """
    tensors = [*module.parameters(), *module.buffers()]
    return tuple(
        (
            StorageWeakRef(tensor.untyped_storage()),
            tensor.storage_offset(),
            0 if tensor.is_inference() else tensor._version,
            tensor.dtype,
        )
        for tensor in tensors
    )


def probe_of(module: nn.Module) -> list[Tensor]:
    """Views of a few values of each parameter: the first of each third, which in qkv are the queries, keys and values.

    peft fuses adapters through ``.data`` and fused optimisers write without a new version. Either changes a weight all over,
    so that a few of its values tell.
    """
    flat = [parameter.detach().flatten() for parameter in module.parameters()]
    return [third[:PROBE_VALUES] for values in flat for third in values.chunk(3)]


@dataclass(frozen=True)
class Slabs:
    """Weights by unit in rank order; the first axis of each is the unit.

    Attributes:
        entry: (U, rows, C) rows of the layer that opens (qkv or fc1).
        entry_bias: (U, rows).
        leave: (U, rows', C) transposed columns of the layer that closes (output projection or fc2).
        leave_bias: (C,), never sliced.
    """

    entry: Tensor
    entry_bias: Tensor
    leave: Tensor
    leave_bias: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the sliceable weights."""
        return sum(part.numel() * part.element_size() for part in (self.entry, self.entry_bias, self.leave))


def require_plain(*layers: nn.Module) -> None:
    """Raise a `DyditError` unless the weights of ``layers`` are all that they compute with."""
    for layer in layers:
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
            raise DyditError(
                f"Compact execution cannot slice a {type(layer).__module__}.{type(layer).__qualname__}.",
                why="It slices the weights of plain linear layers, and an adapter or a quantised layer holds more than these.",
                fix="Merge the adapter into the weights first, or call model.set_execution('dense').",
            )


def attention_slabs(attention: DynamicAttention) -> Slabs:
    """Pack attention: entry is [H, 3 * C_h, C] (q, k, v of a head side by side), leave is [H, C_h, C]."""
    require_plain(attention.qkv, attention.proj)
    heads, dim, order = attention.num_heads, attention.head_dim, attention.head_order
    channels = attention.qkv.in_features
    weight = attention.qkv.weight.view(3, heads, dim, channels).index_select(1, order)
    bias = attention.qkv.bias.view(3, heads, dim).index_select(1, order)
    leave = attention.proj.weight.view(channels, heads, dim).index_select(1, order)
    return Slabs(
        entry=weight.transpose(0, 1).reshape(heads, 3 * dim, channels).contiguous(),
        entry_bias=bias.transpose(0, 1).reshape(heads, 3 * dim).contiguous(),
        leave=leave.permute(1, 2, 0).contiguous(),
        leave_bias=attention.proj.bias,
    )


def mlp_slabs(mlp: DynamicMlp) -> Slabs:
    """Pack the MLP: entry is [G, width, C] rows of fc1, leave is [G, width, C] transposed columns of fc2."""
    require_plain(mlp.fc1, mlp.fc2)
    groups, width, order = mlp.num_groups, mlp.group_width, mlp.channel_order
    channels = mlp.fc1.in_features
    return Slabs(
        entry=mlp.fc1.weight.index_select(0, order).view(groups, width, channels),
        entry_bias=mlp.fc1.bias.index_select(0, order).view(groups, width),
        leave=mlp.fc2.weight.t().index_select(0, order).contiguous().view(groups, width, channels),
        leave_bias=mlp.fc2.bias,
    )


@dataclass(frozen=True)
class Slice:
    """The active part of a layer: (k * rows, C), (k * rows,), (k * rows', C), (C,); ``units`` is k."""

    units: int
    entry: Tensor
    entry_bias: Tensor
    leave: Tensor
    leave_bias: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the sliced weights."""
        return sum(part.numel() * part.element_size() for part in (self.entry, self.entry_bias, self.leave))


def prefix_slice(slabs: Slabs, units: int) -> Slice:
    """The ``units`` most important units, as views."""
    return Slice(
        units,
        slabs.entry[:units].flatten(0, 1),
        slabs.entry_bias[:units].flatten(),
        slabs.leave[:units].flatten(0, 1),
        slabs.leave_bias,
    )


def gathered_slice(slabs: Slabs, active: tuple[int, ...]) -> Slice:
    """The units with the ranks ``active``, as a copy."""
    index = torch.tensor(active, device=slabs.entry.device, dtype=torch.long)
    return Slice(
        len(active),
        slabs.entry.index_select(0, index).flatten(0, 1),
        slabs.entry_bias.index_select(0, index).flatten(),
        slabs.leave.index_select(0, index).flatten(0, 1),
        slabs.leave_bias,
    )


@dataclass(frozen=True)
class Packed:
    """A layer's slabs, and what tells that the layer has changed since: its stamp, and views with the values they had."""

    stamp: Stamp
    slabs: Slabs
    probe: list[Tensor]
    values: list[Tensor]


class SlabStore:
    """Slabs of many layers, and the gathered slices of recent masks within a byte budget.

    Args:
        budget: Bytes of gathered slices to keep, as a multiple of the slabs' own bytes; the least recently used goes first.
    """

    def __init__(self, budget: float = 1.0) -> None:
        self._budget = budget
        self._packed: dict[int, Packed] = {}
        self._slices: OrderedDict[tuple[int, tuple[int, ...]], Slice] = OrderedDict()
        self._slice_bytes = 0
        self._slab_bytes = 0
        # Two threads may share a model; packing twice would be waste, evicting twice an error.
        self._lock = Lock()

    @property
    def slice_bytes(self) -> int:
        """Bytes of the gathered slices that are held."""
        return self._slice_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of everything that is held beside the model: slabs and gathered slices."""
        return self._slab_bytes + self._slice_bytes

    def slice(self, layer: DynamicAttention | DynamicMlp, active: tuple[int, ...]) -> Slice:
        """Return the weights of the units with the ascending ranks ``active``.

        Raises:
            DyditError: If the layer holds more than plain weights.
        """
        # What is packed under inference mode must also serve a forward whose gradient is wanted.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            slabs = self._slabs_of(layer)
            if not active or active[-1] == len(active) - 1:
                return prefix_slice(slabs, len(active))
            key = (id(layer), active)
            found = self._slices.get(key)
            if found is not None:
                self._slices.move_to_end(key)
                return found
            made = gathered_slice(slabs, active)
            self._slices[key] = made
            self._slice_bytes += made.nbytes
            while self._slice_bytes > self._budget * self._slab_bytes and len(self._slices) > 1:
                _, evicted = self._slices.popitem(last=False)
                self._slice_bytes -= evicted.nbytes
            return made

    def drop_edited(self) -> None:
        """Forget everything if a layer was edited behind its stamp; one comparison for all layers, once a forward."""
        with self._lock:
            held = list(self._packed.values())
            for device in {piece.device for packed in held for piece in packed.probe[:1]}:
                here = [packed for packed in held if packed.probe[0].device == device]
                now = torch.cat([piece for packed in here for piece in packed.probe])
                if not torch.equal(now, torch.cat([piece for packed in here for piece in packed.values])):
                    self._clear()
                    return

    def clear(self) -> None:
        """Forget everything, to free its memory; the next forward packs again."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._packed.clear()
        self._slices.clear()
        self._slab_bytes = self._slice_bytes = 0

    def _slabs_of(self, layer: DynamicAttention | DynamicMlp) -> Slabs:
        stamp = stamp_of(layer)
        held = self._packed.get(id(layer))
        if held is not None and held.stamp == stamp:
            return held.slabs
        if held is not None:
            self._forget(id(layer), held.slabs)
        slabs = attention_slabs(layer) if isinstance(layer, DynamicAttention) else mlp_slabs(layer)
        probe = probe_of(layer)
        self._packed[id(layer)] = Packed(stamp, slabs, probe, [piece.clone() for piece in probe])
        self._slab_bytes += slabs.nbytes
        return slabs

    def _forget(self, layer: int, slabs: Slabs) -> None:
        del self._packed[layer]
        self._slab_bytes -= slabs.nbytes
        for key in [key for key in self._slices if key[0] == layer]:
            self._slice_bytes -= self._slices.pop(key).nbytes
