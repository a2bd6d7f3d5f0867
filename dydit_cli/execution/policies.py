"""Where the weights of a schedule's masks come from: views, cached copies, or slabs swapped in place.

A mask is the ascending tuple of the ranks that are on. Slabs lie in some order of units; a mask whose units are the first of that
order costs nothing, a view. Which order, and what becomes of the other masks, is decided for each layer once a schedule is known:

* *prefix*: the layer's masks are nested, so that one order makes every one of them a prefix. Views, for ever.
* *cache*: the distinct masks of the layer fit into the byte budget. Copies, made once.
* *swap*: they do not. At each step the slabs that change sides of the prefix change places; no memory beside the slabs.
* *gather*: they do not, and so many units change from step to step that copying all active ones is cheaper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ActiveUnits = tuple[int, ...]

# A swap reads and writes a slab twice each way; a gathered slab is read and written once.
SWAP_COST = 2
CHAIN_CANDIDATES = 64


@dataclass(frozen=True)
class LayerSchedule:
    """A layer's masks at every step.

    Attributes:
        units: Number of units.
        unit_bytes: Bytes of one unit's slabs.
        masks: The mask of each step, in the order of the schedule.
    """

    units: int
    unit_bytes: int
    masks: tuple[ActiveUnits, ...]


@dataclass(frozen=True)
class Arrangement:
    """What is done for a layer.

    Attributes:
        policy: ``prefix``, ``cache``, ``swap`` or ``gather``.
        order: The ranks in the order in which slabs lie.
        targets: For ``swap``: the order of slabs under each mask. It is a function of the schedule alone, so that results do
            not depend on what ran before.
    """

    policy: str
    order: ActiveUnits
    targets: Mapping[ActiveUnits, ActiveUnits] = field(default_factory=dict)


def nested(masks: Sequence[ActiveUnits], units: int) -> ActiveUnits | None:
    """The order of ranks under which every mask is a prefix, or None if there is none."""
    chain = sorted(set(masks), key=len)
    order: list[int] = []
    for mask in chain:
        if not set(order) <= set(mask):
            return None
        order += [rank for rank in mask if rank not in set(order)]
    return (*order, *(rank for rank in range(units) if rank not in set(order)))


def best_chain(masks: Sequence[ActiveUnits]) -> list[ActiveUnits]:
    """The nested masks that together are used most often; of a long schedule, among the most frequent masks."""
    counts = Counter(masks).most_common(CHAIN_CANDIDATES)
    candidates = sorted(counts, key=lambda entry: len(entry[0]))
    sets = [frozenset(mask) for mask, _ in candidates]
    best: list[tuple[int, int]] = []
    for index, (_, count) in enumerate(candidates):
        inner = [(best[other][0], other) for other in range(index) if sets[other] < sets[index]]
        weight, before = max(inner, default=(0, -1))
        best.append((weight + count, before))
    chain: list[ActiveUnits] = []
    index = max(range(len(best)), key=lambda i: best[i][0], default=-1)
    while index >= 0:
        chain.append(candidates[index][0])
        index = best[index][1]
    return chain[::-1]


def swap_orders(masks: Sequence[ActiveUnits], units: int) -> tuple[dict[ActiveUnits, ActiveUnits], int]:
    """The order of slabs under each mask, and how many slabs move in one run of the schedule.

    A unit that comes takes the place of one that goes; what stays on its side of the prefix stays where it is.
    """
    order = list(range(units))
    targets: dict[ActiveUnits, ActiveUnits] = {}
    moved = 0
    for mask in masks:
        before = order
        if mask not in targets:
            active, count = set(mask), len(mask)
            entering = [rank for rank in mask if rank not in order[:count]]
            order = list(order)
            for position in range(count):
                if order[position] not in active:
                    other = order.index(entering.pop(0))
                    order[position], order[other] = order[other], order[position]
            targets[mask] = tuple(order)
        order = list(targets[mask])
        moved += sum(one != other for one, other in zip(before, order, strict=True))
    return targets, moved


def arrange(layers: Sequence[LayerSchedule], budget: float, may_swap: bool) -> list[Arrangement]:
    """Choose for every layer.

    Args:
        layers: What a schedule asks of them.
        budget: Bytes of copies beside the slabs, for all of them.
        may_swap: Whether slabs may be swapped in place.
    """
    chosen: list[Arrangement | None] = []
    for layer in layers:
        order = nested(layer.masks, layer.units)
        chosen.append(Arrangement("prefix", order) if order is not None else None)
    open_layers = [index for index, found in enumerate(chosen) if found is None]
    whole = {index: _copies(layers[index], set(layers[index].masks)) for index in open_layers}
    if sum(whole.values()) <= budget:
        # In the order of ranks, in which results are those of an unplanned forward bit for bit.
        return [
            found or Arrangement("cache", tuple(range(layer.units)))
            for found, layer in zip(chosen, layers, strict=True)
        ]
    plans = {index: _without_cache(layers[index], may_swap) for index in open_layers}
    # What saves most copying for a byte of cache gets it first.
    ranked = []
    for index in open_layers:
        layer = layers[index]
        chain = best_chain(layer.masks)
        order = nested(chain, layer.units)
        needed = _copies(layer, set(layer.masks) - set(chain))
        ranked.append((plans[index][1] * layer.unit_bytes / needed, index, needed, order))
    left = budget
    for _, index, needed, order in sorted(ranked, key=lambda entry: entry[0], reverse=True):
        if needed <= left and order is not None:
            chosen[index] = Arrangement("cache", order)
            left -= needed
        else:
            chosen[index] = plans[index][0]
    return [found for found in chosen if found is not None]


def _copies(layer: LayerSchedule, masks: set[ActiveUnits]) -> int:
    return layer.unit_bytes * sum(len(mask) for mask in masks)


def _without_cache(layer: LayerSchedule, may_swap: bool) -> tuple[Arrangement, int]:
    """The cheaper of swapping and gathering, and its cost in copied units for one run."""
    changes = [mask for before, mask in zip(((), *layer.masks), layer.masks, strict=False) if before != mask]
    gathered = sum(len(mask) for mask in changes)
    targets, moved = swap_orders(layer.masks, layer.units)
    if may_swap and SWAP_COST * moved < gathered:
        return Arrangement("swap", targets[layer.masks[0]], targets), SWAP_COST * moved
    order = nested(best_chain(layer.masks), layer.units)
    return Arrangement("gather", order or tuple(range(layer.units))), gathered
