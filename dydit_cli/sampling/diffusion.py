"""Samplers of the diffusion families (DiT, Latte): DDPM, DDIM and DPM-Solver++, on diffusers' schedulers.

All use the 1000 linear betas that DiT was trained with, and the evenly spaced timesteps of the original's respacing (both ends
included). Predictions are epsilon, nothing is clipped.

Source: facebookresearch/DiT (diffusion/), checked state by state in tests/sampling; dydit's conventions in docs/.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dydit_cli.objectives.schedules import TRAIN_TIMESTEPS, dpm_solver_timesteps, spaced_timesteps
from dydit_cli.sampling.field import Field, Noise

BETA_START, BETA_END = 1e-4, 0.02
LINEAR_BETAS = {
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "num_train_timesteps": TRAIN_TIMESTEPS,
}


def ddpm(field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """Ancestral sampling with the learned variance, or the large fixed one of a model that learned none."""
    scheduler = DDPMScheduler(
        **LINEAR_BETAS,
        timestep_spacing="linspace",
        variance_type="learned_range" if field.learned_sigma else "fixed_large",
        clip_sample=False,
    )
    scheduler.set_timesteps(timesteps=spaced_timesteps(steps).tolist())
    state = start
    for step, time in enumerate(scheduler.timesteps):
        prediction = field(state, time)
        # The scheduler finds the variance along axis 1, where videos have their frames.
        moved = scheduler.step(
            prediction.movedim(-3, 1), time, state.movedim(-3, 1), generator=noise.generators(step)
        )
        # No noise is added after the last step, where the mean is the predicted image; diffusers omits it at t = 0 only.
        following = moved.prev_sample if step + 1 < steps else moved.pred_original_sample
        state = following.movedim(1, -3)
        yield state


def ddim(field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """Deterministic DDIM (eta = 0). ``noise`` is not used.

    diffusers' scheduler steps back by 1000 // steps whatever the timesteps are, which is not the spacing above. It is therefore
    built on the betas of the respaced chain, as the original's `SpacedDiffusion` does, with every one of its timesteps used.
    """
    times = spaced_timesteps(steps)
    products = np.cumprod(1 - np.linspace(BETA_START, BETA_END, TRAIN_TIMESTEPS))[times.flip(0).numpy()]
    betas = 1 - products / np.concatenate([[1.0], products[:-1]])
    scheduler = DDIMScheduler(
        num_train_timesteps=steps, trained_betas=betas, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    state = start
    for time, position in zip(times, scheduler.timesteps, strict=True):
        state = scheduler.step(_epsilon(field, state, time), int(position), state, eta=0.0).prev_sample
        yield state


def dpm_solver(field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++ (2M), deterministic. ``noise`` is not used."""
    scheduler = DPMSolverMultistepScheduler(
        **LINEAR_BETAS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="linspace",
        variance_type=None,
    )
    scheduler.set_timesteps(steps)
    state = start
    for time in dpm_solver_timesteps(steps):
        state = scheduler.step(_epsilon(field, state, time), time, state).prev_sample
        yield state


def _epsilon(field: Field, state: Tensor, time: Tensor) -> Tensor:
    """The predicted noise alone: DDIM and DPM-Solver++ have no use for a variance, and diffusers' mishandle its channels."""
    return field(state, time)[..., : state.shape[-3], :, :]
