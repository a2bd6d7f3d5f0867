"""Samplers of the flow-matching family (SiT): Euler, Heun, dopri5 and the Euler-Maruyama SDE.

x_t = t * data + (1 - t) * noise, the model gives the velocity data - noise, and sampling runs from t = 0 to t = 1. ``steps``
counts intervals, not points (the original's options count points).

Source: willisma/SiT (transport/), checked state by state in tests/sampling; dydit's conventions in docs/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.objectives.schedules import SDE_LAST_STEP, grid, sde_times
from dydit_cli.sampling.field import Field, Noise

DOPRI5_ATOL, DOPRI5_RTOL = 1e-6, 1e-3
FROZEN_INTERVALS = 50
WITHOUT_FP64 = ("mps",)
"""Kinds of devices that know no double precision."""
MAX_EVALUATIONS = 500


def euler(field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """The ODE by Euler's method on ``steps`` equal intervals. ``noise`` is not used."""
    state = start
    for time, until in pairwise(grid(steps).to(start.device)):
        state = state + (until - time) * field(state, time)
        yield state


def heun(field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """The ODE by Heun's method (second order, two evaluations an interval). ``noise`` is not used."""
    state = start
    for time, until in pairwise(grid(steps).to(start.device)):
        first = field(state, time)
        second = field(state + (until - time) * first, until)
        state = state + (until - time) * (first + second) / 2
        yield state


def dopri5(field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """The ODE by torchdiffeq's adaptive dopri5, which chooses its own steps. ``noise`` is not used.

    A static field is integrated in one go, as in the original, and ``steps`` only says at how many points the path is
    reported. A dynamic one jumps where its widths change, and the error control would shrink its steps there without end: so
    the widths are frozen inside each of 50 intervals, as decided at its start, and the solver restarts at the next. Token
    decisions stay live.

    The error control sees the batch as one state: for images that do not depend on their batch, pass one at a time.

    Raises:
        DyditError: After 500 evaluations.
    """
    limited = _Limited(field)
    if not field.dynamic:
        yield from _adaptive(limited, start, grid(steps))[1:]
        return
    state = start
    for interval in grid(FROZEN_INTERVALS).unfold(0, 2, 1):
        limited.field = field.frozen(interval[0].to(start.device))
        state = _adaptive(limited, state, interval, restart=True)[-1]
        yield state


def sde(field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """The SDE by Euler-Maruyama with the original's defaults: diffusion sigma(t) = 1 - t, last step "Mean" of 0.04.

    ``steps`` counts model evaluations: ``steps - 1`` equal noisy intervals over [0, 0.96], then the mean over the last 0.04.
    """
    times = sde_times(steps).to(start.device)
    width = times[1] - times[0]
    state = start
    for step, time in enumerate(times[:-1]):
        diffusion = 1 - time
        kick = torch.sqrt(2 * diffusion) * torch.sqrt(width) * noise.step(step)
        state = state + width * _sde_drift(field, state, time) + kick
        yield state
    yield state + SDE_LAST_STEP * _sde_drift(field, state, times[-1])


def _sde_drift(field: Field, state: Tensor, time: Tensor) -> Tensor:
    """velocity + diffusion * score; the score of the linear path is (t * velocity - x) / (1 - t), so 1 - t cancels."""
    velocity = field(state, time)
    return velocity + (time * velocity - state)


def _adaptive(field: _Limited, state: Tensor, times: Tensor, restart: bool = False) -> Tensor:
    """States at ``times`` (T,), (T, B, C, h, w).

    Args:
        field: What to integrate.
        state: Where to start, at the first of the times.
        times: At which states are wanted; the solver's own steps go beyond and are interpolated, as in the original.
        restart: Never evaluate beyond the last of the times, and try to get there in one step: 7 evaluations, where the solver's
            own guess of a first step would cost more.
    """
    from torchdiffeq import odeint

    # fp64 times: an end that is missed by a rounding error would cost another step. Where a device has no fp64, the solver's own
    # arithmetic is done on the CPU.
    place = torch.device("cpu") if state.device.type in WITHOUT_FP64 else state.device
    times = times.to(place, torch.float64)
    options = {"first_step": 1.000001 * (times[-1] - times[0]), "step_t": times[-1:]} if restart else {}

    def slope(time: Tensor, value: Tensor) -> Tensor:
        return field(time, value.to(state.device)).to(place)

    # Lists, as in the original: they make torchdiffeq compare errors in fp64, and the states then agree to the last bit.
    path: Tensor = odeint(
        slope,
        state.to(place),
        times,
        method="dopri5",
        atol=[DOPRI5_ATOL],
        rtol=[DOPRI5_RTOL],
        options=options,
    )
    return path.to(state.device)


@dataclass
class _Limited:
    """A field in torchdiffeq's argument order that gives up after `MAX_EVALUATIONS`, over all intervals of a run."""

    field: Field
    evaluations: int = 0

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        if self.evaluations == MAX_EVALUATIONS:
            raise DyditError(
                f"dopri5 gave up at t = {float(time):.3f} after {MAX_EVALUATIONS} evaluations of the model.",
                why="Its error control shrank the steps: the velocity changes too abruptly on the way, as token decisions do.",
                fix="Use a fixed grid (--sampler heun --steps 50), or run the complete model with --execution static.",
            )
        self.evaluations += 1
        return self.field(state, time.to(torch.float32).to(state.device))
