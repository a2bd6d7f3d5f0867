"""The interface of an objective, and which family has which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_named
from dydit_cli.objectives.diffusion import DiffusionObjective
from dydit_cli.objectives.flow import FlowObjective
from dydit_cli.objectives.rectified import RectifiedFlowObjective


class Objective(Protocol):
    """How data is noised, what the model should answer, and which timesteps are asked.

    Attributes:
        kind: ``diffusion``, ``flow`` or ``rectified-flow``.
        num_strata: Equal parts of the time axis; sample i of a batch draws from part i mod ``num_strata``.
    """

    kind: str
    num_strata: int

    def for_shape(self, shape: Sequence[int]) -> Objective:
        """The objective at the resolution of one sample's ``shape``; itself where the noise levels do not depend on it."""
        ...

    def draw_timesteps(self, uniforms: Tensor, indices: Sequence[int]) -> Tensor:
        """(B,) uniforms in [0, 1) and the samples' global indices -> (B,) stratified timesteps, fp32."""
        ...

    def grid(self, count: int) -> Tensor:
        """(count,) timesteps, the middles of ``count`` parts that a sampler of evenly spaced levels visits alike, fp32."""
        ...

    def ratio_weights(self, t: Tensor) -> Tensor | None:
        """(B,) weights that make a mean over `draw_timesteps` one over `grid`; None where the two are distributed alike."""
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


OBJECTIVES: dict[str, type[DiffusionObjective] | type[FlowObjective] | type[RectifiedFlowObjective]] = {
    "diffusion": DiffusionObjective,
    "flow": FlowObjective,
    "rectified-flow": RectifiedFlowObjective,
}


def objective_for(family_name: str) -> Objective:
    """The objective of a family, at no particular resolution.

    Raises:
        DyditError: if there is no such family.
    """
    return OBJECTIVES[family_named(family_name).objective]()


def objective_of(model: DynamicModel) -> Objective:
    """The objective of a model, at the resolution that its geometry states."""
    return objective_for(model.family).for_shape(model.geometry.sample_shape)
