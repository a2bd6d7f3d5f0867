"""The proof that a conversion changed nothing: the written artifact against the source, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.dynamic.gates import CompleteGating, Gating, ImposedGating, ThresholdGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import objective_of

SAMPLES = 4
TIMESTEPS = 50
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """Largest differences, relative to the largest output; None for what a model too large to be loaded was not asked.

    Attributes:
        weights: Between the source's tensors and the artifact's; 0 means bit for bit.
        dense: All-on dense output against the static one.
        compact: Compact output against the dense one, with the masks that the routers decide now.
        scale: The largest output, for scale.
        switched_on: The lowest share of heads, groups and tokens that the routers switch on as they are, over all noise levels;
            1 for a fresh conversion, unless the xavier start meets a model whose activations outweigh the paper's biases.
    """

    weights: float
    dense: float | None
    compact: float | None
    scale: float | None
    switched_on: float | None


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
    differences = [(state[key].double() - tensor.double()).abs().max() for key, tensor in tensors.items()]
    weights = float(torch.stack(differences).max())
    with torch.no_grad():
        static, _ = _run(model, "static", CompleteGating(), seed)
        complete, _ = _run(model, "dense", CompleteGating(), seed)
        live, routing = _run(model, "dense", ThresholdGating(), seed)
        # The same masks: a logit within rounding of zero may fall to either side, which is no fault of the arithmetic.
        compact, _ = _run(model, "compact", ImposedGating(routing), seed)
        widths = model.set_execution("dense").routing(objective_of(model).grid(TIMESTEPS))
    scale = float(static.abs().max())
    of_dense = float((complete - static).abs().max()) / max(scale, 1e-12)
    of_compact = float((compact - live).abs().max()) / max(scale, 1e-12)
    result = Verification(
        weights=weights,
        dense=of_dense,
        compact=of_compact,
        scale=scale,
        switched_on=min(float(mask.mean()) for mask in (widths.heads, widths.groups, routing.tokens)),
    )
    # Written so that a difference that is not a number fails as well.
    if not (weights == 0 and of_dense <= TOLERANCE and of_compact <= TOLERANCE):
        raise DyditError(
            "The converted model does not equal its source.",
            why=f"Largest differences: weights {weights:.1e}, dense {of_dense:.1e}, compact {of_compact:.1e} of the output.",
            fix="Nothing was written. Please report this with the checkpoint's origin; it is a defect of dydit.",
        )
    return result


def _run(model: DynamicModel, execution: str, gating: Gating, seed: int) -> tuple[Tensor, Routing]:
    sample, condition = model.example_inputs(SAMPLES, seed)
    times = objective_of(model).grid(SAMPLES)
    return model.denoise(sample, times, condition, executor=model.make_executor(execution), gating=gating)
