"""The sampler of FLUX: Euler's method on noise levels that move up with the number of tokens, through diffusers' scheduler.

x_t = (1 - t) * data + t * noise, the model gives the velocity noise - data, and sampling runs from t = 1 to t = 0. The levels are
those of diffusers' `FluxPipeline` for the same scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.objectives.rectified import BASE_SHIFT, BASE_TOKENS, MAX_SHIFT, MAX_TOKENS, PATCH_AREA
from dydit_cli.sampling.field import Field, Noise

Schedule = Mapping[str, Any]
"""A scheduler's configuration, as a pipeline folder holds it."""

CLASS = "FlowMatchEulerDiscreteScheduler"
TRAIN_TIMESTEPS = 1000
DEV: Schedule = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": BASE_SHIFT,
    "max_shift": MAX_SHIFT,
    "base_image_seq_len": BASE_TOKENS,
    "max_image_seq_len": MAX_TOKENS,
}
"""That of FLUX.1-dev; schnell's does not shift."""


def scheduler_at(
    shape: Sequence[int], steps: int, schedule: Schedule = DEV
) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a run: ``shape`` is (..., h, w) of a latent.

    Raises:
        DyditError: If the configuration is another scheduler's.
    """
    name = schedule.get("_class_name", CLASS)
    if name != CLASS:
        raise DyditError(
            f"The pipeline's scheduler is a {name}.",
            why=f"The sampler 'euler' of FLUX is diffusers' {CLASS}.",
            fix="Give a pipeline with that scheduler, or prepared conditions (--cache) and no pipeline.",
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(schedule))
    config = scheduler.config
    tokens = shape[-1] * shape[-2] // PATCH_AREA
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    # As `FluxPipeline` asks for them: the last level before 0 is 1 / steps.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    scheduler.set_begin_index(0)
    return scheduler


def times(steps: int, shape: Sequence[int], schedule: Schedule = DEV) -> Tensor:
    """The (steps,) levels at which the model is asked, on the CPU."""
    return scheduler_at(shape, steps, schedule).timesteps / TRAIN_TIMESTEPS


def euler(
    field: Field, start: Tensor, steps: int, noise: Noise, schedule: Schedule = DEV
) -> Iterator[Tensor]:
    """The ODE by Euler's method. ``noise`` is not used."""
    scheduler = scheduler_at(start.shape, steps, schedule)
    state = start
    for timestep in scheduler.timesteps:
        velocity = field(state, timestep / TRAIN_TIMESTEPS)
        state = scheduler.step(velocity, timestep, state, return_dict=False)[0]
        yield state
