"""See that an exported FLUX computes what its source computes, at two resolutions, with the code that was shipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import LazyTensors, lazily
from dydit_cli.export.verify import judged, shipped
from dydit_cli.randomness import normal

RUNNABLE = 50_000_000
"""Parameters up to which the whole model is run: beyond, that takes minutes and twice its memory on a CPU."""
SIDES = (4, 8)
"""Of the small resolution in tokens; the other is twice as wide."""
PROMPT = 6
TIMES = (0.9, 0.1)
GUIDANCE = 3.5


@torch.no_grad()
def flux_difference(
    model_class: type, config: Mapping[str, Any], tensors: LazyTensors, transformer: Path, code: Path
) -> tuple[float, bool]:
    """Run a model with the package's code and with the shipped code, on the written weights.

    A model that is too large is run with one block of either kind, in bf16: the same code on weights of the real size. (That all
    weights were written as they should is compared tensor by tensor.)

    Args:
        model_class: The package's.
        config: Of the model, keyword arguments alone.
        tensors: What was to be written, under the model's keys.
        transformer: The exported folder.
        code: The shipped file.

    Returns:
        The largest absolute difference, and whether the whole model was run.

    Raises:
        DyditError: If it is more than rounding.
    """
    whole = sum(spec.numel for spec in tensors.specs.values()) <= RUNNABLE
    depth = {name: min(1, config[name]) for name in ("num_layers", "num_single_layers")}
    shape = dict(config) if whole else dict(config) | depth
    dtype = torch.float32 if whole else torch.bfloat16
    expected = _outputs(built(model_class, shape, tensors, dtype))
    with shipped(code) as module:
        shipped_class = getattr(module, model_class.__name__)
        if whole:
            model = shipped_class.from_pretrained(str(transformer), torch_dtype=dtype)
            _assign(model, model.state_dict(), dtype)
        else:
            model = built(shipped_class, shape, lazily(open_checkpoint(transformer).tensors), dtype)
        found = _outputs(model)
    return judged(found, expected), whole


def built(model_class: type, config: Mapping[str, Any], tensors: LazyTensors, dtype: torch.dtype) -> Any:
    """A model with the weights that its configuration asks for, perhaps not all that there are."""
    with torch.device("meta"):
        model: Any = model_class(**config)
    _assign(model, {key: tensors[key] for key in model.state_dict()}, dtype)
    # As `from_pretrained` leaves it.
    return model.eval().requires_grad_(False).set_execution("compact")


def _assign(model: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a model copies: numbers in a mapped file may lie at places for which kernels add up in another order."""
    copies = {
        key: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for key, tensor in state.items()
    }
    model.load_state_dict(copies, assign=True)


def _outputs(model: Any) -> Tensor:
    """Predictions at two resolutions, all in one row."""
    predictions = []
    for tokens in ((SIDES[0], SIDES[0]), SIDES):
        for time in TIMES:
            predictions.append(prediction(model, tokens, time).flatten().float())
    return torch.cat(predictions)


def prediction(model: Any, tokens: tuple[int, int], time: float) -> Tensor:
    """By the stock forward, as pipelines call it: packed latents of ``tokens`` rows and columns."""
    geometry, dtype = model.geometry, model.dtype
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=dtype) for side in tokens), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    image = normal(0, (1, len(places), geometry.packed_channels), "export")
    predicted: Tensor = model(
        hidden_states=image.to(dtype),
        encoder_hidden_states=normal(1, (1, PROMPT, geometry.joint_size), "export").to(dtype),
        pooled_projections=normal(2, (1, geometry.pooled_size), "export").to(dtype),
        timestep=torch.tensor([time], dtype=dtype),
        img_ids=places,
        txt_ids=torch.zeros(PROMPT, 3, dtype=dtype),
        guidance=torch.tensor([GUIDANCE]) if geometry.guidance else None,
        return_dict=False,
    )[0]
    return predicted
