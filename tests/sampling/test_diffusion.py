"""DDPM, DDIM and DPM-Solver++: the original's states, and a case whose solution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dydit_cli.execution import EXECUTIONS
from dydit_cli.sampling import diffusion
from dydit_cli.sampling.guidance import Guidance, GuidedField
from dydit_cli.sampling.noise import ImageNoise
from tests.sampling.models import NO_NOISE, FunctionField, GivenNoise, base_model, trajectory

ALPHAS = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def gaussian_field(deviation: float, channels: int = 1, learned_sigma: bool = False) -> FunctionField:
    """The exact noise prediction where the data is a centred Gaussian: everything about it is known in closed form."""

    def epsilon(state: Tensor, time: Tensor, widths_at: float | None) -> Tensor:
        alpha = float(ALPHAS[int(time)])
        prediction = state * math.sqrt(1 - alpha) / (alpha * deviation**2 + 1 - alpha)
        return (
            torch.cat([prediction, torch.full_like(prediction, 99.0)], dim=1) if learned_sigma else prediction
        )

    return FunctionField(epsilon, learned_sigma=learned_sigma)


def drawn(like: Tensor) -> ImageNoise:
    """Real noise for a batch like ``like``."""
    return ImageNoise(0, tuple(range(len(like))), tuple(like.shape[1:]), like.device)


@pytest.mark.parametrize("execution", EXECUTIONS)
class TestOriginalStates:
    def test_ddpm(self, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case, model = trajectory("dit"), base_model("dit").set_execution(execution)
        noise = GivenNoise(case["ddpm_noise"])
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise.instead_of_randn)
        field = GuidedField(model, case["loss_y"], Guidance(1.0))
        states = torch.stack(list(diffusion.ddpm(field, case["ddpm_init"], 10, noise)))
        assert states.shape == case["ddpm_traj"].shape
        assert float((states - case["ddpm_traj"]).abs().max()) < 1e-4

    def test_ddim(self, execution: str) -> None:
        case, model = trajectory("dit"), base_model("dit").set_execution(execution)
        field = GuidedField(model, case["loss_y"], Guidance(1.0))
        states = torch.stack(list(diffusion.ddim(field, case["ddpm_init"], 10, NO_NOISE)))
        assert states.shape == case["ddim_traj"].shape
        assert float((states - case["ddim_traj"]).abs().max()) < 1e-4


class TestTimesteps:
    def test_the_original_respacing(self) -> None:
        assert torch.equal(diffusion.spaced_timesteps(10), trajectory("dit")["timesteps"])

    @pytest.mark.parametrize("steps", [2, 3, 7, 26, 27, 50, 250, 999, 1000])
    def test_the_same_as_diffusers(self, steps: int) -> None:
        ancestral = DDPMScheduler(timestep_spacing="linspace")
        ancestral.set_timesteps(steps)
        assert torch.equal(diffusion.spaced_timesteps(steps), ancestral.timesteps)
        if steps < 1000:
            solver = DPMSolverMultistepScheduler(timestep_spacing="linspace")
            solver.set_timesteps(steps)
            assert torch.equal(diffusion.dpm_solver_timesteps(steps), solver.timesteps)

    def test_no_timestep_comes_twice(self) -> None:
        for times in (diffusion.spaced_timesteps(1000), diffusion.dpm_solver_timesteps(999)):
            assert len(times.unique()) == len(times)

    @pytest.mark.parametrize("integrate", [diffusion.ddpm, diffusion.ddim, diffusion.dpm_solver])
    def test_one_step_predicts_the_image_from_the_noise(self, integrate) -> None:
        field, start = gaussian_field(0.5), torch.randn(2, 1, 4, 4)
        (state,) = integrate(field, start, 1, drawn(start))
        alpha = float(ALPHAS[999])
        expected = (
            start - math.sqrt(1 - alpha) * field.function(start, torch.tensor(999), None)
        ) / math.sqrt(alpha)
        assert field.asked == [(999.0, None)]
        torch.testing.assert_close(state, expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("integrate", "times"),
        [
            (diffusion.ddpm, diffusion.spaced_timesteps),
            (diffusion.ddim, diffusion.spaced_timesteps),
            (diffusion.dpm_solver, diffusion.dpm_solver_timesteps),
        ],
    )
    def test_the_model_is_asked_where_the_plan_expects_it(self, integrate, times) -> None:
        field, start = gaussian_field(0.5), torch.randn(1, 1, 2, 2)
        list(integrate(field, start, 12, drawn(start)))
        assert [time for time, _ in field.asked] == times(12).tolist()


class TestKnownSolution:
    """Data N(0, s^2): the probability-flow ODE multiplies the start by s / sqrt(alpha s^2 + 1 - alpha)."""

    @pytest.mark.parametrize(
        ("integrate", "steps", "tolerance"), [(diffusion.ddim, 500, 1e-2), (diffusion.dpm_solver, 40, 5e-3)]
    )
    @pytest.mark.parametrize("learned_sigma", [False, True])
    def test_deterministic_samplers_solve_the_ode(
        self, integrate, steps, tolerance, learned_sigma: bool
    ) -> None:
        start = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        *_, state = integrate(gaussian_field(0.5, learned_sigma=learned_sigma), start, steps, NO_NOISE)
        alpha = float(ALPHAS[999])
        expected = start * 0.5 / math.sqrt(alpha * 0.25 + 1 - alpha)
        assert state.shape == start.shape
        assert float((state - expected).abs().max() / expected.abs().max()) < tolerance

    def test_ddpm_without_learned_variance_has_the_right_spread(self) -> None:
        start = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
        *_, state = diffusion.ddpm(gaussian_field(0.5), start, 250, drawn(start))
        assert abs(float(state.std()) - 0.5) < 0.02

    def test_fixed_large_variance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first step with a model that predicts nothing, against the formula: mean plus sqrt(beta) of noise."""
        noise = GivenNoise(torch.ones(2, 1, 1, 2, 2))
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise.instead_of_randn)
        field = FunctionField(lambda state, time, widths_at: torch.zeros_like(state))
        state = next(diffusion.ddpm(field, torch.zeros(1, 1, 2, 2), 2, noise))
        beta = 1 - float(ALPHAS[999]) / float(ALPHAS[0])
        torch.testing.assert_close(state, torch.full_like(state, math.sqrt(beta)))
