"""What the tests of sampling share: the shipped base models, fields that are plain functions, and noise given from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import dydit_cli
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Hints
from dydit_cli.families.registry import family_named

BASE_MODELS = Path(dydit_cli.__file__).parent / "assets" / "models"
PARITY = Path(__file__).resolve().parent.parent / "parity"


def base_model(family_name: str) -> DynamicTransformer:
    """The shipped Fashion-MNIST model of a family with everything on, whatever its untrained routers say."""
    family = family_named(family_name)
    source = family.read(
        read_checkpoint(BASE_MODELS / f"{family_name}_fmnist.pt").tensors, Hints(num_heads=8)
    )
    model = family.build(source.config)
    assert not model.load_state_dict(source.tensors, strict=False).unexpected_keys
    return model.eval().requires_grad_(False).set_keep_bias(float("inf"))


def trajectory(family_name: str) -> dict[str, Tensor]:
    """States that the original implementation went through."""
    return load_file(PARITY / f"{family_name}_trajectory" / "io.safetensors")


@dataclass
class FunctionField:
    """A field that is a function of state and time, and remembers where it was asked.

    ``widths_at`` is the time at which widths were frozen, and is handed to the function; None while they are live.
    """

    function: Callable[[Tensor, Tensor, float | None], Tensor]
    learned_sigma: bool = False
    dynamic: bool = False
    widths_at: float | None = None
    asked: list[tuple[float, float | None]] = field(default_factory=list)

    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        self.asked.append((float(time), self.widths_at))
        return self.function(state, time, self.widths_at)

    def frozen(self, time: Tensor) -> FunctionField:
        return FunctionField(self.function, self.learned_sigma, self.dynamic, float(time), self.asked)


@dataclass
class GivenNoise:
    """The noise of a parity case, (steps, B, C, h, w)."""

    values: Tensor
    current: int = 0

    def generators(self, step: int) -> list[torch.Generator]:
        self.current = step
        return []

    def step(self, step: int) -> Tensor:
        return self.values[step]

    def instead_of_randn(self, shape: tuple[int, ...], **options: object) -> Tensor:
        """Takes the place of diffusers' ``randn_tensor``."""
        assert shape == self.values.shape[1:]
        return self.values[self.current]


NO_NOISE = GivenNoise(torch.empty(0))
