"""Euler, Heun, dopri5 and the SDE: the original's states, and fields whose solution is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.execution import EXECUTIONS
from dydit_cli.sampling import flow
from dydit_cli.sampling.guidance import Guidance, GuidedField
from tests.sampling.models import NO_NOISE, FunctionField, GivenNoise, base_model, trajectory


def unfused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in the order of operations with which the parity case was made."""
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value


def decay(rate: float = 1.0, **options: bool) -> FunctionField:
    return FunctionField(lambda state, time, widths_at: -rate * state, **options)


@pytest.mark.parametrize("execution", EXECUTIONS)
class TestOriginalStates:
    @pytest.mark.parametrize(("integrate", "key"), [(flow.euler, "ode_euler"), (flow.heun, "ode_heun2")])
    def test_fixed_grids(self, execution: str, integrate, key: str) -> None:
        case, model = trajectory("sit"), base_model("sit").set_execution(execution)
        field = GuidedField(model, case["loss_y"], Guidance(1.0))
        states = torch.stack([case["ode_init"], *integrate(field, case["ode_init"], 10, NO_NOISE)])
        assert states.shape == case[key].shape
        assert float((states - case[key]).abs().max()) < 1e-4

    def test_sde(self, execution: str) -> None:
        case, model = trajectory("sit"), base_model("sit").set_execution(execution)
        field = GuidedField(model, case["loss_y"], Guidance(1.0))
        states = torch.stack(list(flow.sde(field, case["ode_init"], 20, GivenNoise(case["sde_noise"]))))
        assert states.shape == case["sde_em"].shape
        assert float((states - case["sde_em"]).abs().max()) < 1e-4


class TestOriginalDopri5:
    """The last state is interpolated in a step that leads beyond t = 1, where the model was never trained.

    How far beyond hangs on the rounding of every evaluation before: fused attention alone moves that state by 0.006. In the
    order of operations of the original it is equal.
    """

    def states(self) -> tuple[Tensor, Tensor, int]:
        case = trajectory("sit")
        field = GuidedField(base_model("sit").set_execution("static"), case["loss_y"], Guidance(1.0))
        states = torch.stack([case["ode_init"], *flow.dopri5(field, case["ode_init"], 10, NO_NOISE)])
        return states, case["ode_dopri5"], field.meter.evaluations

    def test_all_states_in_the_original_arithmetic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(F, "scaled_dot_product_attention", unfused_attention)
        states, expected, evaluations = self.states()
        assert states.shape == expected.shape
        assert float((states[:-1] - expected[:-1]).abs().max()) < 1e-3
        # The last is the farthest along, and shows how products round: below 1e-3 on Intel's processors, 1.7e-3 on an AMD EPYC.
        assert float((states[-1] - expected[-1]).abs().max()) < 3e-3
        assert evaluations < 150

    def test_states_before_the_last_with_fused_attention(self) -> None:
        states, expected, _ = self.states()
        assert float((states[:-1] - expected[:-1]).abs().max()) < 1e-3


class TestKnownSolutions:
    @pytest.mark.parametrize(("integrate", "order"), [(flow.euler, 1), (flow.heun, 2)], ids=["euler", "heun"])
    def test_order_of_convergence(self, integrate, order: int) -> None:
        start = torch.ones(1, 1, 1, 1, dtype=torch.float64)

        def error(steps: int) -> float:
            *_, state = integrate(decay(), start, steps, NO_NOISE)
            return abs(float(state) - math.exp(-1))

        assert error(20) / error(40) == pytest.approx(2**order, rel=0.1)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_dopri5(self, dynamic: bool) -> None:
        start = torch.rand(2, 1, 3, 3)
        *_, state = flow.dopri5(decay(3.0, dynamic=dynamic), start, 5, NO_NOISE)
        torch.testing.assert_close(state, start * math.exp(-3), rtol=5e-3, atol=1e-5)

    def test_sde_keeps_the_law_of_the_data(self) -> None:
        """Data N(0, s^2): the exact velocity is x (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2)."""
        deviation = 0.5

        def velocity(state: Tensor, time: Tensor, widths_at: float | None) -> Tensor:
            t = float(time)
            return state * (t * deviation**2 - (1 - t)) / (t**2 * deviation**2 + (1 - t) ** 2)

        generator = torch.Generator().manual_seed(0)
        start, noise = (
            torch.randn(1, 1, 100, 100, generator=generator),
            torch.randn(100, 1, 1, 100, 100, generator=generator),
        )
        *_, state = flow.sde(FunctionField(velocity), start, 100, GivenNoise(noise))
        assert abs(float(state.std()) - deviation) < 0.03


class TestSteps:
    @pytest.mark.parametrize(
        ("integrate", "states", "asked"), [(flow.euler, 4, 4), (flow.heun, 4, 8), (flow.sde, 4, 4)]
    )
    def test_steps_count_intervals(self, integrate, states: int, asked: int) -> None:
        field = decay()
        noise = GivenNoise(torch.zeros(4, 1, 1, 2, 2))
        assert len(list(integrate(field, torch.zeros(1, 1, 2, 2), 4, noise))) == states
        assert len(field.asked) == asked

    def test_sde_ends_with_a_noiseless_step_at_0_96(self) -> None:
        field, start = decay(0.0), torch.zeros(1, 1, 2, 2)
        noise = GivenNoise(torch.full((3, 1, 1, 2, 2), float("nan")))
        noise.values[:2] = 0
        states = list(flow.sde(field, start, 3, noise))
        assert [time for time, _ in field.asked] == pytest.approx([0, 0.48, 0.96])
        assert bool(torch.isfinite(states[-1]).all())


class TestFrozenWidths:
    def test_widths_change_at_fifty_edges_only(self) -> None:
        field = decay(dynamic=True)
        list(flow.dopri5(field, torch.ones(1, 1, 2, 2), 50, NO_NOISE))
        edges = [widths_at for _, widths_at in field.asked]
        assert sorted(set(edges)) == pytest.approx([interval / 50 for interval in range(50)])
        assert edges == sorted(edges)
        for time, begin in field.asked:
            assert begin - 1e-6 <= time <= begin + 0.02 + 1e-6
        assert len(field.asked) == 7 * 50

    def test_a_field_that_jumps_with_its_widths_is_integrated_piece_by_piece(self) -> None:
        """Velocity = the time at which widths were decided: a staircase, whose integral is the left Riemann sum of t."""
        field = FunctionField(lambda state, time, widths_at: torch.full_like(state, widths_at), dynamic=True)
        *_, state = flow.dopri5(field, torch.zeros(1, 1, 1, 1), 50, NO_NOISE)
        assert float(state) == pytest.approx(sum(interval / 50 for interval in range(50)) / 50, abs=1e-5)
        assert len(field.asked) == 7 * 50

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_gives_up_after_500_evaluations(self, dynamic: bool) -> None:
        field = FunctionField(lambda state, time, widths_at: torch.sin(2e4 * state), dynamic=dynamic)
        with pytest.raises(DyditError, match="after 500 evaluations") as error:
            list(flow.dopri5(field, torch.linspace(0, 1, 16).view(1, 1, 4, 4), 50, NO_NOISE))
        assert len(field.asked) == 500
        assert "--sampler heun" in error.value.fix
