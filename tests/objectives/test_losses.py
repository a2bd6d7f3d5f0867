"""The losses equal the original repositories' on their own numbers; timesteps are stratified."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.execution import DenseExecutor
from dydit_cli.objectives import objective_for
from dydit_cli.objectives.diffusion import DiffusionObjective
from dydit_cli.objectives.objective import Objective
from tests.objectives.base_models import PARITY, base_model


@torch.no_grad()
def losses_of(family: str, clean: torch.Tensor, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    objective = objective_for(family)
    t, noise = case["loss_t"].float(), case["loss_noise"]
    prediction, _ = base_model(family).denoise(
        objective.noised(clean, noise, t),
        t,
        case["loss_y"],
        executor=DenseExecutor(),
        gating=CompleteGating(),
    )
    return objective.losses(prediction, clean, noise, t)


def test_diffusion_losses_equal_the_original() -> None:
    """facebookresearch/DiT, training_losses, t = 0, 20, 400, 999: both branches of the bound."""
    case = load_file(PARITY / "dit_trajectory" / "io.safetensors")
    losses = losses_of("dit", case["loss_x0"], case)
    torch.testing.assert_close(losses["mse"], case["loss_mse"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["vb"], case["loss_vb"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["loss"], case["loss_total"], rtol=1e-5, atol=1e-6)


def test_flow_losses_equal_the_original() -> None:
    """willisma/SiT, training_losses of the linear path."""
    case = load_file(PARITY / "sit_trajectory" / "io.safetensors")
    clean, noise, t = case["loss_data"], case["loss_noise"], case["loss_t"]
    objective = objective_for("sit")
    torch.testing.assert_close(objective.noised(clean, noise, t), case["loss_xt"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        losses_of("sit", clean, case)["loss"], case["loss_total"], rtol=1e-5, atol=1e-6
    )


def test_the_bound_trains_the_variance_alone() -> None:
    objective = objective_for("dit")
    clean, noise = torch.linspace(-1, 1, 32).view(2, 1, 4, 4), torch.linspace(2, -2, 32).view(2, 1, 4, 4)
    prediction = torch.full((2, 2, 4, 4), 0.3, requires_grad=True)
    objective.losses(prediction, clean, noise, torch.tensor([0.0, 500.0]))["vb"].sum().backward()
    assert prediction.grad is not None
    assert float(prediction.grad[:, 0].abs().max()) == 0.0
    assert float(prediction.grad[:, 1].abs().min()) > 0.0


def test_without_a_learned_variance_the_loss_is_the_squared_error() -> None:
    objective = objective_for("dit")
    clean, noise = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    losses = objective.losses(torch.full((2, 1, 4, 4), 3.0), clean, noise, torch.tensor([0.0, 500.0]))
    assert set(losses) == {"loss", "mse"}
    assert losses["loss"].tolist() == [4.0, 4.0]


def test_noise_levels_are_weighted_by_min_snr() -> None:
    """Equation 6 of arXiv 2303.09556 for predicted noise, but for one factor: 1 on average over timesteps."""
    plain, weighted = DiffusionObjective(), DiffusionObjective(snr_gamma=5)
    t = torch.arange(1000.0)
    clean, noise = torch.zeros(1000, 1, 4, 4), torch.ones(1000, 1, 4, 4)
    prediction = torch.full((1000, 1, 4, 4), 3.0)
    before, after = (objective.losses(prediction, clean, noise, t)["loss"] for objective in (plain, weighted))
    weights = after / before
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    ratio = 1 / plain.noise_level(t) ** 2 - 1
    noisy = ratio < 5
    assert 0 < int(noisy.sum()) < 1000
    torch.testing.assert_close(weights[noisy], weights[-1].expand(int(noisy.sum())))
    torch.testing.assert_close(weights[~noisy] / weights[-1], 5 / ratio[~noisy], rtol=1e-3, atol=1e-6)
    # What is reported, and the bound, are as ever.
    both = torch.cat([prediction, prediction], dim=1)
    parts = [objective.losses(both, clean, noise, t) for objective in (plain, weighted)]
    torch.testing.assert_close(parts[0]["mse"], parts[1]["mse"])
    torch.testing.assert_close(parts[1]["loss"], weights * parts[0]["mse"] + parts[0]["vb"])


@pytest.mark.parametrize(("family", "top"), [("dit", 1000), ("sit", 1)])
def test_timesteps_are_stratified_by_global_index(family: str, top: int) -> None:
    objective = objective_for(family)
    indices = range(5, 405)
    uniforms = torch.linspace(0, 1 - 2**-24, len(indices))
    t = objective.draw_timesteps(uniforms, indices)
    quarters = (t * 4 / top).floor().long()
    assert quarters.tolist() == [index % 4 for index in indices]
    largest = objective.draw_timesteps(torch.tensor([1 - 2**-24]), [3])
    assert float(largest) == 999 if family == "dit" else float(largest) < 1


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_grid_and_noise_level(family: str) -> None:
    objective: Objective = objective_for(family)
    grid = objective.grid(50)
    assert len(grid) == 50
    levels = objective.noise_level(grid)
    assert bool(((levels >= 0) & (levels <= 1)).all())
    rising = levels if family == "dit" else levels.flip(0)
    assert bool((rising.diff() > 0).all()), "diffusion gets noisier with t, flow cleaner"
    assert grid[:2].tolist() == pytest.approx([10.0, 30.0] if family == "dit" else [0.01, 0.03])
