"""At which timesteps a sampler asks the model: known before it runs, for every sampler but those that choose their own steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from dydit_cli.errors import DyditError, did_you_mean

TRAIN_TIMESTEPS = 1000
SDE_LAST_STEP = 0.04


def spaced_timesteps(steps: int) -> Tensor:
    """The timesteps of a DDPM or DDIM run, (steps,) int64, descending from 999 to 0.

    The same as the original's respacing and diffusers' "linspace". A single step stands at 999, where the pure noise is
    (ours: both of them would put it at 0 and take the noise for an image).
    """
    if steps == 1:
        return torch.tensor([TRAIN_TIMESTEPS - 1])
    # Ascending first, as diffusers has it: the middle one of an odd number, 499.5, is rounded from there.
    return torch.from_numpy(np.linspace(0, TRAIN_TIMESTEPS - 1, steps).round().astype(np.int64)).flip(0)


def dpm_solver_timesteps(steps: int) -> Tensor:
    """The timesteps of a DPM-Solver++ run, (steps,) int64: as above with one more, but without the last, 0."""
    return spaced_timesteps(steps + 1)[:-1]


def grid(steps: int) -> Tensor:
    """The edges of ``steps`` equal intervals of [0, 1], (steps + 1,) fp32."""
    return torch.linspace(0, 1, steps + 1)


def starts(steps: int) -> Tensor:
    """Where Euler's method asks: the edges without the last, (steps,) fp32."""
    return grid(steps)[:-1]


def sde_times(steps: int) -> Tensor:
    """Where an SDE run of ``steps`` steps asks the model, (steps,) fp32 over [0, 0.96]."""
    return torch.linspace(0, 1 - SDE_LAST_STEP, steps)


SCHEDULES: Mapping[str, Mapping[str, Callable[[int], Tensor]]] = {
    "diffusion": {
        "ddpm": spaced_timesteps,
        "ddim": spaced_timesteps,
        "dpm++": dpm_solver_timesteps,
    },
    "flow": {"euler": starts, "heun": grid, "sde": sde_times},
}
"""By kind of model and name of a sampler of `dydit sample`; the first of a kind is its default."""


def timesteps_of(objective: str, sampler: str | None, steps: int) -> tuple[str, Tensor]:
    """A sampler's name and the timesteps at which ``steps`` of its steps ask the model, in the family's own convention.

    Args:
        objective: The kind of model, ``diffusion`` or ``flow``.
        sampler: As `dydit sample` names it; None for the default.
        steps: Steps of a run.

    Raises:
        DyditError: For a sampler that this kind of model does not have, or that chooses its own timesteps, and for steps that
            would ask twice at one timestep.
    """
    known = SCHEDULES[objective]
    name = sampler or next(iter(known))
    if name not in known:
        raise DyditError(
            f"The timesteps of the sampler '{name}' are not known before it runs.",
            why=f"Of this kind of model, those of {', '.join(known)} are.",
            fix=did_you_mean(name, known) or "Pass one of these with --sampler, or leave it out.",
        )
    if steps > TRAIN_TIMESTEPS or (name == "sde" and steps < 2):
        times = torch.empty(0)
    else:
        times = known[name](steps)
    if not len(times) or len(times.unique()) != len(times):
        raise DyditError(
            f"{steps} steps do not fit the sampler '{name}'.",
            why=f"No two steps may share one of {TRAIN_TIMESTEPS} noise levels, and sde needs two steps.",
            fix="Pass another number with --steps; 50 is the default.",
        )
    return name, times
