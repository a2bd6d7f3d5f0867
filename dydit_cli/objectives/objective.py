"""The interface of an objective, and which family has which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dydit_cli.families.registry import family_named
from dydit_cli.objectives.diffusion import DiffusionObjective
from dydit_cli.objectives.flow import FlowObjective


class Objective(Protocol):
    """How data is noised, what the model should answer, and which timesteps are asked.

    Attributes:
        kind: ``diffusion`` or ``flow``.
        num_strata: Equal parts of the time axis; sample i of a batch draws from part i mod ``num_strata``.
    """

    kind: str
    num_strata: int

    def draw_timesteps(self, uniforms: Tensor, indices: Sequence[int]) -> Tensor:
        """(B,) uniforms in [0, 1) and the samples' global indices -> (B,) stratified timesteps, fp32."""
        ...

    def grid(self, count: int) -> Tensor:
        """(count,) evenly spaced timesteps, the middles of ``count`` equal parts, fp32."""
        ...

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mix (B, C, h, w) data and noise at (B,) timesteps."""
        ...

    def losses(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """(B,) values by name; ``loss`` is what is minimised, the others are its parts."""
        ...

    def noise_level(self, t: Tensor) -> Tensor:
        """Share of noise in [0, 1] at (B,) timesteps; 1 is pure noise. For plots."""
        ...


def objective_for(family_name: str) -> Objective:
    """The objective of a family.

    Raises:
        DyditError: if there is no such family.
    """
    kinds: dict[str, type[DiffusionObjective] | type[FlowObjective]] = {
        "diffusion": DiffusionObjective,
        "flow": FlowObjective,
    }
    return kinds[family_named(family_name).objective]()
