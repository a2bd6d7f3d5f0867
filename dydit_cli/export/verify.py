"""See that an export computes what its source computes, with the code that was shipped in it, before the command says done."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.export.importing import imported
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.randomness import normal

TIMESTEPS = (900.0, 100.0)
TOLERANCE = 1e-5
"""Of the largest output, in fp32; the same code on the same weights should leave nothing at all."""
CHECKED = "dydit_export_check"


@torch.no_grad()
def reload_difference(source: DynamicModel, transformer: Path, code: Path) -> float:
    """Load an exported transformer with its shipped code and compare it with its source.

    Args:
        source: The model in its family's own convention, with the weights as written, in fp32.
        transformer: The exported folder.
        code: The shipped file.

    Returns:
        The largest absolute difference over a batch of two noise levels.

    Raises:
        DyditError: If it is more than rounding.
    """
    noise = normal(0, (len(TIMESTEPS), *source.geometry.sample_shape), "export")
    times = torch.tensor(TIMESTEPS)
    labels = torch.arange(len(TIMESTEPS)) % max(1, source.geometry.num_classes)
    expected = _as_pipelines_see_it(source, noise, times, labels)
    with shipped(code) as module:
        shipped_class = getattr(module, family_of(source).pipeline_class.__name__)
        reloaded = shipped_class.from_pretrained(str(transformer), torch_dtype=torch.float32)
        found = reloaded(noise, times, labels, return_dict=False)[0]
    return judged(found, expected)


def judged(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference between what an export computes and what its source does.

    Raises:
        DyditError: If it is more than rounding.
    """
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * max(scale, 1e-6):
        raise DyditError(
            f"The exported model does not compute what its source computes: the outputs differ by {difference:.2g}.",
            why=f"Loaded with its own code, it should agree with the source to rounding on outputs of up to {scale:.2g}.",
            fix="Nothing was written; report this with the versions that `pip list` shows for torch and diffusers.",
        )
    return difference


def _as_pipelines_see_it(model: DynamicModel, noise: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """The prediction in the convention of diffusers' schedulers: for flows t = 1 - timestep / 1000, towards the noise."""
    if family_of(model).objective == "flow":
        velocity: Tensor = model(noise, 1 - times / 1000, labels, return_dict=False)[0]
        return -velocity
    prediction: Tensor = model(noise, times, labels, return_dict=False)[0]
    return prediction


def shipped(code: Path) -> AbstractContextManager[ModuleType]:
    """Import a file of code; see `imported`."""
    return imported(CHECKED, code)
