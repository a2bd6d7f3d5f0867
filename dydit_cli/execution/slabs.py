"""Weights of a dynamic layer as slabs, one a unit, sorted by rank: what compact execution slices.

A head or channel group is one contiguous slab, so that a mask that is a prefix costs nothing (a view) and any other mask is one
`index_select` per weight. Slabs are a copy beside the stored parameters, which keep the source's order; they carry the version
of their source, and are packed again when it changed. Once a schedule is known, `policies.py` says in which order the slabs of
each layer lie, and which masks are copied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dydit_cli.errors import DyditError
from dydit_cli.execution.effective import adapter_state
from dydit_cli.execution.policies import ActiveUnits, Arrangement, LayerSchedule, arrange
from dydit_cli.execution.quantised import parts_of_tensor
from dydit_cli.execution.slices import Slice, gathered_slice, prefix_slice
from dydit_cli.execution.units import Slabs, SlicedLayer, UnitLayers, pack, unit_layers, with_timed

Stamp = tuple[Hashable, ...]


def stamp_of(layer: SlicedLayer) -> Stamp:
    """Identify the present values of a layer's tensors: storage, in-place version and dtype of each, and which adapters are in use.

    Loading, casting, moving and editing in place change one of these. A weak reference names the storage, because an address
    is given to another tensor once its owner is gone. Writing through ``.data`` changes none: see `watch.py`. Tensors made
    under inference mode have no version.
    """
    modules = list(layer.modules())
    tensors = [
        part
        for module in modules
        for held in (module._parameters, module._buffers)
        for tensor in held.values()
        if tensor is not None
        for part in parts_of_tensor(tensor)
    ]
    adapters = tuple(state for state in map(adapter_state, modules) if state is not None)
    return adapters + tuple(
        (
            StorageWeakRef(tensor.untyped_storage()),
            tensor.storage_offset(),
            0 if tensor.is_inference() else tensor._version,
            tensor.dtype,
        )
        for tensor in tensors
    )


@dataclass
class FreedWeights:
    """What a layer is left with once its stored weights are given back (`freeing.py`). It stands on the layer itself, so that
    stores may come and go.

    Attributes:
        slabs: Its weights; the first axis follows ``order``.
        order: The rank at each position.
        part: The linear layers at that time.
        ranks: Which stored head or channel had which rank.
    """

    slabs: Slabs
    order: ActiveUnits
    part: UnitLayers
    ranks: Tensor

    def current(self, layer: SlicedLayer) -> Slabs:
        """The slabs, with the bias that the layer has now.

        Raises:
            DyditError: If the layer is not what it was when its weights were given back.
        """
        found = unit_layers(layer)
        opening = zip(found.opening, self.part.opening, strict=True)
        same = found.closing is self.part.closing and all(now is then for now, then in opening)
        held = [getattr(now, name, None) for now in found.opening for name in ("weight", "bias")]
        held.append(getattr(found.closing, "weight", None))
        gone = all(weight is None or weight.is_meta for weight in held)
        if not same or not gone or not torch.equal(found.order, self.ranks):
            raise DyditError(
                "Weights were changed, or an adapter was attached, while the model's stored weights are freed.",
                why="The packed weights are all there is, and they do not follow.",
                fix="Call model.unpack() first, then change the model, then model.pack(free=True) again.",
            )
        bias = getattr(found.closing, "bias", None)
        slabs = self.slabs if bias is None else replace(self.slabs, leave_bias=bias)
        # What follows the timestep was not given back, and may have changed.
        index = torch.tensor(self.order, device=slabs.entry.device)
        return with_timed(slabs, found, index)

    def by_rank(self) -> Slabs:
        """The slabs in the order of ranks."""
        index = torch.tensor(
            [self.order.index(rank) for rank in range(len(self.order))], device=self.slabs.entry.device
        )
        return self.slabs.map(lambda part: part.index_select(0, index))


def freed_of(layer: SlicedLayer) -> FreedWeights | None:
    """What a layer's freed weights became; None if they are where they are stored."""
    found: FreedWeights | None = getattr(layer, "freed_weights", None)
    return found


@dataclass
class Packed:
    """A layer's slabs in some order of units.

    Attributes:
        layer: Kept, so that its address stays its own.
        stamp: Tells that the layer has changed since.
        slabs: Its weights; the first axis follows ``order``.
        order: The rank at each position.
        targets: Under the swap policy, the order under each mask of the schedule: slabs then move in place.
        lock: Held while slabs move, and while weights are used that may move.
    """

    layer: SlicedLayer
    stamp: Stamp
    slabs: Slabs
    order: ActiveUnits
    targets: Mapping[ActiveUnits, ActiveUnits] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def prefix(self, active: ActiveUnits) -> bool:
        """Whether the units are the first that lie there."""
        return set(self.order[: len(active)]) == set(active)

    def positions(self, active: ActiveUnits) -> ActiveUnits:
        """Where the units lie."""
        return tuple(self.order.index(rank) for rank in active)


class SlabStore:
    """Slabs of many layers, and the gathered slices of recent masks within a byte budget.

    Without a schedule the least recently used slice goes first. With one, a slice goes whose next use is farthest, and a new one
    that is farther still is not kept.

    Args:
        budget: Bytes of gathered slices to keep, as a multiple of the slabs' own bytes.
    """

    def __init__(self, budget: float = 1.0) -> None:
        self._budget = budget
        self._packed: dict[int, Packed] = {}
        self._views: dict[tuple[int, ActiveUnits], Slice] = {}
        self._slices: OrderedDict[tuple[int, ActiveUnits], Slice] = OrderedDict()
        self._uses: dict[tuple[int, ActiveUnits], list[int]] = {}
        self._moving: set[int] = set()
        self._period = 0
        self._clock = 0
        self._slice_bytes = 0
        self._slab_bytes = 0
        self.copied_bytes = 0
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

    @property
    def slab_bytes(self) -> int:
        """Bytes of the slabs."""
        return self._slab_bytes

    def slice(self, layer: SlicedLayer, active: ActiveUnits) -> Slice:
        """Return the weights of the units with the ascending ranks ``active``, packed again if the layer changed.

        Raises:
            DyditError: If the layer holds more than plain weights.
        """
        # What is packed under inference mode must also serve a forward whose gradient is wanted.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._slice(self._packed_of(layer), active)

    def ready(self, layer: SlicedLayer, active: ActiveUnits) -> Slice:
        """The same for a layer that is known to be unchanged since it was packed: no check, and mostly no more than a look-up."""
        key = (id(layer), active)
        found = self._views.get(key)
        if found is not None:
            return found
        with self._lock:
            found = self._slices.get(key)
            if found is not None:
                self._slices.move_to_end(key)
                return found
            with torch.inference_mode(False), torch.no_grad():
                packed = self._packed.get(id(layer)) or self._packed_of(layer)
                return self._slice(packed, active)

    def is_view(self, layer: SlicedLayer, active: ActiveUnits) -> bool:
        """Whether `ready` gives a view of the slabs; else it gives a copy that may be dropped."""
        return (id(layer), active) in self._views

    def moves(self, layer: SlicedLayer) -> bool:
        """Whether the layer's slabs change places while a schedule runs, so that they must be `leased`."""
        return id(layer) in self._moving

    @contextmanager
    def leased(self, layer: SlicedLayer, active: ActiveUnits) -> Iterator[Slice]:
        """`ready` for weights that may move in place once the block is left: nobody moves them before.

        Where a gradient is wanted the weights outlive the block, so that they are copied.
        """
        packed = self._packed.get(id(layer))
        target = packed.targets.get(active) if packed is not None and packed.targets else None
        if packed is None or target is None or torch.is_grad_enabled():
            yield self.ready(layer, active)
            return
        with packed.lock:
            if packed.order != target:
                self._move(packed, target)
            yield prefix_slice(packed.slabs, len(active))

    def arrange(self, schedule: Sequence[tuple[SlicedLayer, Sequence[ActiveUnits]]]) -> Counter[str]:
        """Choose how the masks of a schedule are served, and lay the slabs out for it; later masks are served all the same.

        Args:
            schedule: Layers, each with its mask at every step.

        Returns:
            How many layers follow which policy.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            held = [self._packed_of(layer) for layer, _ in schedule]
            asked = [
                LayerSchedule(
                    len(packed.order), packed.slabs.nbytes // max(1, len(packed.order)), tuple(masks)
                )
                for packed, (_, masks) in zip(held, schedule, strict=True)
            ]
            # On an accelerator a swap would have to wait for what other streams still read, and copies are quick there.
            may_swap = all(packed.slabs.entry.device.type == "cpu" for packed in held)
            # Slabs that belong to the layer may be read by other stores too.
            may_swap = may_swap and all(freed_of(layer) is None for layer, _ in schedule)
            found = arrange(asked, self._budget * self._slab_bytes, may_swap)
            self._uses.clear()
            self._views.clear()
            self._period = max((len(masks) for _, masks in schedule), default=0)
            self._clock = 0
            for packed, (layer, masks), arrangement in zip(held, schedule, found, strict=True):
                self._lay_out(packed, arrangement)
                (self._moving.add if arrangement.targets else self._moving.discard)(id(layer))
                for step, mask in enumerate(masks):
                    self._uses.setdefault((id(layer), mask), []).append(step)
            for key in [key for key in self._slices if key not in self._uses]:
                self._slice_bytes -= self._slices.pop(key).nbytes
            return Counter(arrangement.policy for arrangement in found)

    def at(self, step: int) -> None:
        """Say which step of the schedule runs now, from which the next use of a slice is counted."""
        self._clock = step

    def clear(self) -> None:
        """Forget everything, to free its memory; the next forward packs again."""
        with self._lock:
            self._packed.clear()
            self._slices.clear()
            self._views.clear()
            self._uses.clear()
            self._moving.clear()
            self._slab_bytes = self._slice_bytes = self._period = 0

    def _packed_of(self, layer: SlicedLayer) -> Packed:
        stamp = stamp_of(layer)
        held = self._packed.get(id(layer))
        if held is not None and held.stamp == stamp:
            return held
        if held is not None:
            self._forget(id(layer), held.slabs)
            self._moving.discard(id(layer))
        freed = freed_of(layer)
        slabs = pack(layer) if freed is None else freed.current(layer)
        order = tuple(range(len(slabs.entry))) if freed is None else freed.order
        packed = Packed(layer, stamp, slabs, order)
        self._packed[id(layer)] = packed
        self._slab_bytes += slabs.nbytes
        return packed

    def _slice(self, packed: Packed, active: ActiveUnits) -> Slice:
        key = (id(packed.layer), active)
        found = self._slices.get(key)
        if found is not None:
            self._slices.move_to_end(key)
            return found
        if not packed.targets and packed.prefix(active):
            view = prefix_slice(packed.slabs, len(active))
            self._views[key] = view
            return view
        if not active:
            return prefix_slice(packed.slabs, 0)
        with packed.lock:
            made = gathered_slice(packed.slabs, packed.positions(active))
        self.copied_bytes += made.nbytes
        self._slices[key] = made
        self._slice_bytes += made.nbytes
        while self._slice_bytes > self._budget * self._slab_bytes and (len(self._slices) > 1 or self._uses):
            self._slice_bytes -= self._slices.pop(self._farthest()).nbytes
        return made

    def _farthest(self) -> tuple[int, ActiveUnits]:
        """The slice to drop: one that the schedule does not name, the least recently used first, else the one needed last."""
        farthest, distance = next(iter(self._slices)), -1
        for key in self._slices:
            uses = self._uses.get(key)
            if uses is None:
                # Of a mask that is running now and has no schedule, nothing better is known than that it was used last.
                return key
            after = bisect_left(uses, self._clock + 1)
            wait = uses[after] - self._clock if after < len(uses) else uses[0] + self._period - self._clock
            if wait > distance:
                farthest, distance = key, wait
        return farthest

    def _lay_out(self, packed: Packed, arrangement: Arrangement) -> None:
        """Bring the slabs into an order. Views that were handed out keep the old memory, which nobody writes to."""
        if packed.targets == arrangement.targets and (packed.targets or packed.order == arrangement.order):
            return
        index = torch.tensor(packed.positions(arrangement.order), device=packed.slabs.entry.device)
        self.copied_bytes += packed.slabs.nbytes
        slabs = packed.slabs.map(lambda part: part.index_select(0, index))
        self._packed[id(packed.layer)] = Packed(
            packed.layer, packed.stamp, slabs, arrangement.order, arrangement.targets
        )
        freed = freed_of(packed.layer)
        if freed is not None:
            # They are all there is of these weights: held once, by whom they belong to.
            freed.slabs, freed.order = slabs, arrangement.order

    def _move(self, packed: Packed, target: ActiveUnits) -> None:
        changed = [place for place, rank in enumerate(target) if packed.order[place] != rank]
        sources = [packed.order.index(target[place]) for place in changed]
        device = packed.slabs.entry.device
        into, origin = torch.tensor(changed, device=device), torch.tensor(sources, device=device)
        with torch.inference_mode(False), torch.no_grad():
            for weight in packed.slabs.by_units:
                weight.index_copy_(0, into, weight.index_select(0, origin))
        self.copied_bytes += packed.slabs.nbytes * len(changed) // len(packed.order)
        packed.order = target

    def _forget(self, layer: int, slabs: Slabs) -> None:
        del self._packed[layer]
        self._slab_bytes -= slabs.nbytes
        for held in (self._views, self._slices):
            for key in [key for key in held if key[0] == layer]:
                dropped = held.pop(key)
                self._slice_bytes -= dropped.nbytes if held is self._slices else 0
