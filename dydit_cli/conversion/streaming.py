"""Conversion of models that do not fit into memory: one pass over the weights, one tensor at a time.

Each weight is read (or dequantised, rearranged, merged with an adapter) when its turn comes, its norms are taken for the ranking,
and it is written to its place in the new file. The orders of a block's units are made as soon as its weights have passed. Nothing
is read twice but what verification compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.artifacts.tensor_files import Progress, TensorPlan, write_tensors
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily
from dydit_cli.conversion.fresh_routers import fresh_routers
from dydit_cli.conversion.importance.passing import PassingMagnitude
from dydit_cli.conversion.insertion import check_fit, is_ours
from dydit_cli.conversion.order import Grouping, order_channels, order_heads
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Family, Source
from dydit_cli.families.unit_weights import UnitWeights


@dataclass(frozen=True)
class Ranking:
    """What decides the order of units.

    Attributes:
        units: Of all blocks, in the model's order.
        num_groups: G, groups of channels.
        grouping: How groups are cut.
        scores: Key of an order -> (units,) scores to use in place of the weights' magnitude, for all units or none.
    """

    units: tuple[UnitWeights, ...]
    num_groups: int
    grouping: Grouping = "sorted"
    scores: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Streamed:
    """What a streamed conversion wrote.

    Attributes:
        files: Names of the weight files.
        nbytes: Bytes of all tensors.
        scores: Key of an order -> (units,) fp32 scores.
        orders: Key of an order -> (units,) int64, stored units by rank.
    """

    files: list[str]
    nbytes: int
    scores: dict[str, Tensor]
    orders: dict[str, Tensor]


def stream_weights(
    folder: Path,
    tensors: LazyTensors,
    ranking: Ranking,
    additions: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    on_progress: Progress | None = None,
) -> Streamed:
    """Rank the units of a model and write its weights, orders and additions into ``folder``.

    Args:
        folder: Exists already; the temporary folder of an artifact.
        tensors: Under the model's keys.
        ranking: Of its units.
        additions: Tensors that the source lacks (routers), written as they are.
        dtype: For the source's floating-point tensors; None keeps each tensor's own.
        max_shard_size: Of the weight files.
        on_progress: Called with bytes written and bytes in all.

    Raises:
        DyditError: If weights are not numbers, keys collide, or the disk is too small or refuses.
    """
    _refuse_collisions(tensors, ranking, additions)
    passing = PassingMagnitude(ranking.units)
    # Made at once, for the reason that `PassingMagnitude` gives.
    scores = {unit.order: torch.empty(unit.units) for unit in ranking.units}
    orders = {unit.order: torch.empty(unit.units, dtype=torch.int64) for unit in ranking.units}

    def weight(key: str, to: torch.dtype) -> Tensor:
        tensor = tensors[key]
        passing.observe(key, tensor)
        tensor = tensor.to(to)
        _refuse_broken(key, tensor)
        return tensor

    def order(unit: UnitWeights) -> Tensor:
        given = ranking.scores
        scores[unit.order].copy_(passing.scores(unit) if given is None else given[unit.order])
        return orders[unit.order].copy_(_order(scores[unit.order], unit, ranking))

    plans = _plans(tensors, ranking.units, additions, dtype, weight, order)
    files = write_tensors(folder, plans, max_shard_size=max_shard_size, on_progress=on_progress)
    return Streamed(files, sum(plan.spec.nbytes for plan in plans), scores, orders)


def stream_model(
    folder: Path,
    family: Family,
    source: Source,
    units: Iterable[UnitWeights],
    *,
    seed: int,
    grouping: Grouping = "sorted",
    scores: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    on_progress: Progress | None = None,
) -> Streamed:
    """Write the dynamic model of a source into ``folder``: configuration and weights, as `load_model` reads them.

    The model exists as shapes only. A source with routers of its own keeps them, and the order in which its units stand.

    Args:
        folder: Exists already; the temporary folder of an artifact.
        family: Of the source.
        source: What `Family.read` returned for the tensors of `open_checkpoint`, or of those with LoRAs merged.
        units: Where its units keep their weights, such as `original_flux.units_of`.
        seed: Of the routers' xavier weights.
        grouping: ``sorted`` or ``contiguous`` channel groups.
        scores: As `Ranking` has them.
        dtype, max_shard_size, on_progress: As `stream_weights` has them.

    Raises:
        DyditError: As `stream_weights`, and if the source does not fit its configuration.
    """
    tensors = lazily(source.tensors)
    with torch.device("meta"):
        model = family.model_class(**source.config)
        check_fit(
            family, model, {key: torch.empty(spec.shape) for key, spec in tensors.specs.items()}, source
        )
    if source.dynamic:
        additions = {
            name: torch.arange(len(buffer))
            for name, buffer in model.named_buffers()
            if is_ours(name) and name not in tensors
        }
        ranking = Ranking((), model.geometry.num_groups, grouping)
    else:
        additions = fresh_routers(model, seed)
        ranking = Ranking(tuple(units), model.geometry.num_groups, grouping, scores)
    model.save_config(folder)
    return stream_weights(
        folder,
        tensors,
        ranking,
        additions,
        dtype=dtype,
        max_shard_size=max_shard_size,
        on_progress=on_progress,
    )


@torch.no_grad()
def difference_of(
    folder: Path, tensors: LazyTensors, dtype: torch.dtype | None = None
) -> tuple[float, list[str]]:
    """Compare what was written with what it was made of, tensor by tensor.

    Returns:
        The largest absolute difference after the cast to ``dtype`` (0.0 means equal in every number), and the keys in ``folder``
        that are no source's.

    Raises:
        DyditError: If a tensor of the source was not written.
    """
    written = open_checkpoint(folder).tensors
    missing = [key for key in tensors if key not in written]
    if missing:
        raise DyditError(
            f"{folder} lacks '{missing[0]}'.",
            why="The source has it and the conversion should have written it.",
            fix="Convert again; if it happens again, report it.",
        )
    largest = 0.0
    for key in tensors:
        expected = tensors[key].to(_type_of(tensors.spec(key), dtype))
        if not torch.equal(written[key], expected):
            largest = max(largest, float((written[key].float() - expected.float()).abs().max()))
    return largest, [key for key in written if key not in tensors]


def _plans(
    tensors: LazyTensors,
    units: Iterable[UnitWeights],
    additions: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    weight: Callable[[str, torch.dtype], Tensor],
    order: Callable[[UnitWeights], Tensor],
) -> list[TensorPlan]:
    """Additions first, then the source's tensors in their order, each order of units right after the last weight it needs."""
    plans = [
        TensorPlan(key, TensorSpec(tuple(tensor.shape), tensor.dtype), partial(additions.__getitem__, key))
        for key, tensor in additions.items()
    ]
    position = {key: index for index, key in enumerate(tensors)}
    after: dict[int, list[UnitWeights]] = {}
    for unit in units:
        needed = [position[span.key] for pair in unit.pairs for span in pair]
        after.setdefault(max(needed), []).append(unit)
    for index, key in enumerate(tensors):
        spec = tensors.spec(key)
        to = _type_of(spec, dtype)
        plans.append(TensorPlan(key, TensorSpec(spec.shape, to), partial(weight, key, to)))
        for unit in after.get(index, ()):
            plans.append(TensorPlan(unit.order, TensorSpec((unit.units,), torch.int64), partial(order, unit)))
    return plans


def _type_of(spec: TensorSpec, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype


def _order(scores: Tensor, unit: UnitWeights, ranking: Ranking) -> Tensor:
    if unit.grouped:
        return order_channels(scores[None], ranking.num_groups, ranking.grouping)[0]
    return order_heads(scores[None])[0]


def _refuse_collisions(tensors: LazyTensors, ranking: Ranking, additions: Mapping[str, Tensor]) -> None:
    taken = [key for key in (*additions, *(unit.order for unit in ranking.units)) if key in tensors]
    if taken:
        raise DyditError(
            "The checkpoint is dynamic already.",
            why=f"It holds '{taken[0]}', which is dydit's own.",
            fix="Pass its folder as --model to the next stage; to start over, convert the static checkpoint again.",
        )


def _refuse_broken(key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # Both are NaN where anything is, and neither needs a copy.
    if not all(math.isfinite(float(value)) for value in tensor.aminmax()):
        raise DyditError(
            "The checkpoint holds weights that are not numbers.",
            why=f"'{key}' has NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}.",
            fix="Bring an earlier or undamaged checkpoint; if a type was asked for, ask for a wider one.",
        )
