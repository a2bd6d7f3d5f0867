"""The samplers in one tuple: name, family kind, limits and the timesteps at which each asks the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.objectives import schedules
from dydit_cli.sampling import diffusion, flow, rectified
from dydit_cli.sampling.field import Integrator


@dataclass(frozen=True)
class Sampler:
    """One way to turn noise into a sample.

    Attributes:
        name: As given to ``--sampler``.
        title: For people.
        objective: ``diffusion``, ``flow`` or ``rectified-flow``, as `dydit_cli.families.family.Family` has it.
        integrate: The sampler itself.
        times: The (S,) values of t at which ``steps`` steps evaluate the model, on the CPU; None if nobody can know them before.
        shaped_times: The same for samplers whose times depend on the (..., h, w) shape of a sample.
        min_steps: Fewest steps.
        max_steps: Most steps, or None.
        adaptive: Whether it chooses its own steps from the state of the whole batch, so that images must be made one at a time.
    """

    name: str
    title: str
    objective: str
    integrate: Integrator
    times: Callable[[int], Tensor] | None
    shaped_times: Callable[[int, Sequence[int]], Tensor] | None = None
    min_steps: int = 1
    max_steps: int | None = None
    adaptive: bool = False

    def times_at(self, steps: int, shape: Sequence[int]) -> Tensor | None:
        """The times of a run on samples of a shape, if anybody can know them before."""
        if self.shaped_times is not None:
            return self.shaped_times(steps, shape)
        return self.times(steps) if self.times is not None else None

    def on(self, schedule: rectified.Schedule) -> Sampler:
        """The same sampler on another schedule of noise levels; only FLUX's has one."""
        return replace(
            self,
            integrate=partial(rectified.euler, schedule=schedule),
            shaped_times=partial(rectified.times, schedule=schedule),
        )


# The first of a kind is its default.
SAMPLERS: tuple[Sampler, ...] = (
    Sampler("ddpm", "DDPM", "diffusion", diffusion.ddpm, schedules.spaced_timesteps, max_steps=1000),
    Sampler("ddim", "DDIM, eta 0", "diffusion", diffusion.ddim, schedules.spaced_timesteps, max_steps=1000),
    # With 1000 steps its spacing of steps + 1 points would name a timestep twice.
    Sampler(
        "dpm++",
        "DPM-Solver++ (2M)",
        "diffusion",
        diffusion.dpm_solver,
        schedules.dpm_solver_timesteps,
        max_steps=999,
    ),
    Sampler("euler", "Euler ODE", "flow", flow.euler, schedules.starts),
    Sampler("heun", "Heun ODE", "flow", flow.heun, schedules.grid),
    Sampler("dopri5", "dopri5 ODE, adaptive", "flow", flow.dopri5, None, adaptive=True),
    Sampler("sde", "Euler-Maruyama SDE", "flow", flow.sde, schedules.sde_times, min_steps=2),
    Sampler(
        "euler",
        "Euler ODE on FLUX's levels",
        "rectified-flow",
        rectified.euler,
        None,
        shaped_times=rectified.times,
        max_steps=1000,
    ),
)


def sampler_for(objective: str, name: str | None = None) -> Sampler:
    """Return the sampler called ``name``, or the default of a kind of model.

    Raises:
        DyditError: If there is none of that name, or it does not fit the model; names those that fit.
    """
    fitting = [sampler for sampler in SAMPLERS if sampler.objective == objective]
    if name is None:
        return fitting[0]
    names = ", ".join(sampler.name for sampler in fitting)
    found = next((sampler for sampler in (*fitting, *SAMPLERS) if sampler.name == name), None)
    if found is None:
        raise DyditError(
            f"There is no sampler called '{name}'.",
            why=f"The samplers of {_kind(objective)} models are {names}.",
            fix=did_you_mean(name, [sampler.name for sampler in fitting])
            or f"Leave out --sampler for {fitting[0].name}.",
        )
    if found not in fitting:
        raise DyditError(
            f"The sampler '{name}' does not fit this model.",
            why=f"It is for {_kind(found.objective)} models; this one is a {_kind(objective)} model.",
            fix=f"Pass one of {names} with --sampler, or none for {fitting[0].name}.",
        )
    return found


def check_steps(sampler: Sampler, steps: int) -> None:
    """Raise a `DyditError` unless ``sampler`` can take ``steps`` steps."""
    if steps < sampler.min_steps:
        raise DyditError(
            f"{steps} steps are too few for the sampler '{sampler.name}'.",
            why=f"It needs at least {sampler.min_steps}.",
            fix="Pass more with --steps; 50 is the default.",
        )
    if sampler.max_steps is not None and steps > sampler.max_steps:
        raise DyditError(
            f"{steps} steps are too many for the sampler '{sampler.name}'.",
            why=f"The model was trained on {schedules.TRAIN_TIMESTEPS} noise levels, and no step may repeat one: "
            f"at most {sampler.max_steps} fit.",
            fix=f"Pass --steps {sampler.max_steps} or less; 250 is what the papers use, 50 shows little difference.",
        )


def _kind(objective: str) -> str:
    return {
        "diffusion": "diffusion (DiT)",
        "flow": "flow-matching (SiT)",
        "rectified-flow": "rectified-flow (FLUX)",
    }[objective]
