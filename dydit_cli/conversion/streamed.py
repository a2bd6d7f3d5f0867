"""Conversion of FLUX: weights pass one by one, so that a model of 24 GB needs a few GB of memory.

What `convert.py` does with a model in memory is done here with shapes: the configuration, the routers at their start, the ranking
while weights pass, the report. The outputs are compared as well where the model is small enough to be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.conversion.importance.units import UnitScores, read_unit_scores, write_unit_scores
from dydit_cli.conversion.importance.units_random import random_units
from dydit_cli.conversion.importance.units_taylor import taylor_units
from dydit_cli.conversion.insertion import build_from
from dydit_cli.conversion.lora import MergedLora, merge_loras
from dydit_cli.conversion.order import Grouping
from dydit_cli.conversion.streaming import difference_of, stream_model
from dydit_cli.conversion.verification import Verification, verify
from dydit_cli.data import open_data
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family, Source
from dydit_cli.families.original_flux import units_of
from dydit_cli.objectives import objective_of

RANKINGS = ("magnitude", "taylor", "random")
LOADABLE = 50_000_000
"""Parameters up to which outputs are compared after a conversion, at 4,096 tokens: beyond, that takes minutes on a CPU."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StreamedConversion:
    """What was written.

    Attributes:
        model: The model as shapes, on torch's meta device.
        importance: Method, or "imported".
        verification: Largest differences; of the outputs, nothing where the model is too large to be loaded.
        loras: What was merged.
    """

    model: DynamicModel
    importance: str
    verification: Verification
    loras: tuple[MergedLora, ...]


def write_streamed(
    folder: Path,
    family: Family,
    source: Source,
    *,
    loras: Sequence[str],
    importance: str,
    importance_samples: int,
    data: str | Path | None,
    grouping: Grouping,
    seed: int,
    device: str,
    max_shard_size: str,
    say: Progress,
) -> StreamedConversion:
    """Write the dynamic model of a FLUX source into ``folder`` and verify it.

    Raises:
        DyditError: For everything that a user can put right.
    """
    merged: tuple[MergedLora, ...] = ()
    if loras:
        tensors, merged = merge_loras(source.tensors, loras)
        source = replace(source, tensors=tensors)
    given = (
        None
        if source.dynamic
        else _scores(family, source, importance, importance_samples, data, seed, device, say)
    )

    def passing(done: int, total: int) -> None:
        say("ranking and writing weights", done, total)

    streamed = stream_model(
        folder,
        family,
        source,
        units_of(source.config),
        seed=seed,
        grouping=grouping,
        scores=None if given is None else given.scores,
        max_shard_size=max_shard_size,
        on_progress=passing,
    )
    method = "imported" if source.dynamic else importance if given is None else given.method
    if not source.dynamic:
        details = {} if given is None else given.details
        write_unit_scores(folder, UnitScores(streamed.scores, method, details), streamed.orders, grouping)
    with torch.device("meta"):
        model = family.model_class(**source.config)
    say("verifying against the source", 0, 1)
    return StreamedConversion(model, method, _verified(folder, source.tensors, model, seed), merged)


def _scores(
    family: Family,
    source: Source,
    importance: str,
    samples: int,
    data: str | Path | None,
    seed: int,
    device: str,
    say: Progress,
) -> UnitScores | None:
    """Scores that are not taken from weights as they pass; None for those that are."""
    if importance == "magnitude":
        return None
    units = units_of(source.config)
    if importance == "random":
        return random_units(units, seed)
    if importance == "taylor":
        if data is None:
            raise DyditError(
                "The Taylor ranking needs data.",
                why="It measures how the loss reacts to each unit on training samples.",
                fix="Pass --data CACHE, which `dydit prepare` wrote, or --importance magnitude, which needs none.",
            )
        model = build_from(family, source, seed).requires_grad_(False).to(find_device(device))
        train = open_data(data, geometry=model.geometry).train
        return taylor_units(
            model,
            train,
            objective_of(model),
            samples=samples,
            seed=seed,
            on_progress=lambda done, total: say("ranking heads and channels", done, total),
        )
    if Path(importance).exists():
        return read_unit_scores(Path(importance), units)
    raise DyditError(
        f"There is no importance ranking called '{importance}'.",
        why=f"It is neither one of {', '.join(RANKINGS)} nor an existing file of scores.",
        fix=did_you_mean(importance, RANKINGS) or "Pass one of these.",
    )


def _verified(folder: Path, tensors: Mapping[str, Tensor], model: DynamicModel, seed: int) -> Verification:
    sizes: dict[str, Any] = lazily(tensors).specs
    if sum(spec.numel for spec in sizes.values()) <= LOADABLE:
        return verify(folder, {key: tensors[key] for key in tensors if not key.endswith("_order")}, seed)
    difference, _ = difference_of(folder, lazily(tensors))
    if difference != 0:
        raise DyditError(
            "The converted model does not equal its source.",
            why=f"Weights differ by up to {difference:.1e}.",
            fix="Nothing was written. Please report this with the checkpoint's origin; it is a defect of dydit.",
        )
    return Verification(weights=difference, dense=None, compact=None, scale=None, switched_on=None)
