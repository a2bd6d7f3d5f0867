"""FLUX's objective: its line, its levels, its draws, and the weights between the two."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dydit_cli.objectives import objective_for
from dydit_cli.objectives.rectified import RectifiedFlowObjective, shift_of


def uniforms(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def test_is_the_objective_of_flux() -> None:
    assert isinstance(objective_for("flux"), RectifiedFlowObjective)


def test_mixes_from_data_at_0_to_noise_at_1_and_predicts_noise_minus_data() -> None:
    objective = RectifiedFlowObjective()
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(objective.noised(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(objective.noised(clean, noise, torch.ones(2)), noise)
    assert float(objective.losses(noise - clean, clean, noise, torch.ones(2))["loss"].max()) == 0
    assert float(objective.losses(clean - noise, clean, noise, torch.ones(2))["loss"].min()) > 0


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15)])
def test_shift_is_flux_s_at_both_ends(tokens: int, mu: float) -> None:
    assert shift_of(tokens) == pytest.approx(mu)


def test_levels_are_the_scheduler_s_at_the_same_fractions() -> None:
    objective = RectifiedFlowObjective().for_shape((16, 32, 32))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    fractions = (torch.arange(10) + 0.5) / 10
    expected = scheduler.time_shift(shift_of(256), 1.0, fractions)
    torch.testing.assert_close(objective.grid(10), expected)


def test_draws_are_stratified_logit_normal() -> None:
    objective = RectifiedFlowObjective(location=0.5, scale=0.8)
    indices = list(range(4000))
    t = objective.draw_timesteps(uniforms(4000), indices)
    z = torch.logit(t)
    assert float(z.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(z.std()) == pytest.approx(0.8, abs=0.03)
    quarters = torch.tensor([-10.0, -0.6745, 0.0, 0.6745, 10.0]) * 0.8 + 0.5
    for index in range(8):
        assert quarters[index % 4] - 1e-3 <= z[index] <= quarters[index % 4 + 1] + 1e-3


def test_ends_of_the_axis_stay_inside() -> None:
    t = RectifiedFlowObjective(scale=3.0).draw_timesteps(torch.tensor([0.0, 0.999999]), [0, 3])
    assert bool(((t > 0) & (t < 1)).all())


@pytest.mark.parametrize("shape", [(4, 14, 14), (16, 128, 128)])
@pytest.mark.parametrize("shift_draws", [True, False])
def test_weights_turn_a_mean_over_draws_into_one_over_levels(
    shape: tuple[int, ...], shift_draws: bool
) -> None:
    objective = RectifiedFlowObjective(shift_draws=shift_draws).for_shape(shape)
    t = objective.draw_timesteps(uniforms(40000), range(40000))
    weights = objective.ratio_weights(t)
    assert weights is not None
    levels = objective.grid(2000)
    for function in (torch.square, lambda x: (x > 0.7).float()):
        weighted = float((weights * function(t)).sum() / weights.sum())
        plain, wanted = float(function(t).mean()), float(function(levels).mean())
        # The bound on weights leaves a bias: a small one, unless draws stay behind while the levels move far up.
        assert abs(weighted - wanted) < (0.025 if shift_draws else 0.06)
        assert abs(weighted - wanted) < abs(plain - wanted) + 0.005
