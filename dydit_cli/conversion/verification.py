"""The proof that a conversion changed nothing: the written artifact against the source, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.dynamic.gates import CompleteGating, Gating, ThresholdGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor, DenseExecutor, StaticExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.objectives import objective_for
from dydit_cli.randomness import normal

SAMPLES = 4
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """Largest differences, relative to the largest output.

    Attributes:
        weights: Between the source's tensors and the artifact's; 0 means bit for bit.
        dense: All-on dense output against the static one (for a dynamic file: live dense against live compact is `compact`).
        compact: Compact output against the dense one, as the model decides now.
        scale: The largest output, for scale.
    """

    weights: float
    dense: float
    compact: float
    scale: float


def verify(folder: Path, tensors: Mapping[str, Tensor], seed: int) -> Verification:
    """Load what was written and compare it with the source.

    Args:
        folder: The artifact.
        tensors: The source's tensors under our keys.
        seed: Of the inputs on which outputs are compared.

    Raises:
        DyditError: If they differ by more than rounding.
    """
    model = load_model(folder, execution="static")
    state = model.state_dict()
    weights = max(
        float((state[key].double() - tensor.double()).abs().max()) for key, tensor in tensors.items()
    )
    with torch.no_grad():
        static = _run(model, StaticExecutor(), CompleteGating(), seed)
        complete = _run(model, DenseExecutor(), CompleteGating(), seed)
        live = _run(model, DenseExecutor(), ThresholdGating(), seed)
        compact = _run(model, CompactExecutor(), ThresholdGating(), seed)
    scale = float(static.abs().max())
    result = Verification(
        weights=weights,
        dense=float((complete - static).abs().max()) / max(scale, 1e-12),
        compact=float((compact - live).abs().max()) / max(scale, 1e-12),
        scale=scale,
    )
    if weights > 0 or max(result.dense, result.compact) > TOLERANCE:
        raise DyditError(
            "The converted model does not equal its source.",
            why=f"Largest differences: weights {weights:.1e}, dense {result.dense:.1e}, compact {result.compact:.1e} of the output.",
            fix="Nothing was written. Please report this with the checkpoint's origin; it is a defect of dydit.",
        )
    return result


def _run(
    model: DynamicTransformer,
    executor: StaticExecutor | DenseExecutor | CompactExecutor,
    gating: Gating,
    seed: int,
) -> Tensor:
    geometry = model.geometry
    shape = (SAMPLES, geometry.in_channels, geometry.sample_size, geometry.sample_size)
    times = objective_for(model.family).grid(SAMPLES)
    labels = torch.arange(SAMPLES) % (geometry.num_classes + 1)
    prediction, _ = model.denoise(
        normal(seed, shape, "verify"), times, labels, executor=executor, gating=gating
    )
    return prediction
