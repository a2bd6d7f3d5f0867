"""How many kernels a compact block takes: on a GPU each is a launch, and launches are what small batches wait for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dydit_cli.families.family import Family
from tests.tiny import each_family, predict, tiny_inputs, tiny_model

LAUNCHES = 30
"""Kernels that one planned block may take."""

REARRANGING = 2
"""More in the mean block of a video model: every second one brings query, key and value to their places, and the result back."""

TWO_STREAMS = 75
"""More in a block of two streams: all but attention is there twice, queries and keys are normalised (on a CPU by six kernels for
each of four, on a GPU by one) and rotated, and the token router reads text as well."""

HOST_ONLY = (
    "aten.detach",
    "aten.lift_fresh",
    "aten.item",
    "aten._local_scalar_dense",
    "aten.empty",
    "aten._unsafe_view",
)
"""Operations beside views that compute nothing on the device."""


class KernelCounter(TorchDispatchMode):
    """Counts dispatched operations that compute; views move no data and launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function).rsplit(".", 1)[0]
        if not function.is_view and name not in HOST_ONLY:
            self.counts[name] += 1
        return result


@each_family
@torch.no_grad()
def test_a_planned_block_takes_few_kernels(family: Family) -> None:
    counts, depths = [], []
    for depth in (2, 4):
        model = tiny_model(family, num_layers=depth)
        depths.append(model.geometry.depth)
        hidden, time, labels = tiny_inputs(model, batch=2)
        time = time[:1].expand(2)
        model.set_execution("compact").plan(time[:1])
        predict(model, hidden, time, labels)  # packs the weights
        with KernelCounter() as counter:
            predict(model, hidden, time, labels)
        counts.append(sum(counter.counts.values()))
    per_block = (counts[1] - counts[0]) / (depths[1] - depths[0])
    allowed = LAUNCHES + (REARRANGING if model.geometry.num_frames else 0)
    allowed += TWO_STREAMS if model.geometry.has_context else 0
    assert 8 <= per_block <= allowed, counter.counts
