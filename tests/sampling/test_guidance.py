"""Guidance: the originals' guided outputs, what is guided and what is not, and how many rows it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dydit_cli.execution import EXECUTIONS
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.flops import executed_ratio
from dydit_cli.sampling.guidance import Guidance, GuidedField, RatioMeter
from tests.test_parity import load_case
from tests.tiny import tiny_model


def rows_of_each_call(model: DynamicTransformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the batch size of every forward from now on."""
    rows: list[int] = []
    original: Callable[..., Any] = model.denoise

    def denoise(states: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(states))
        return original(states, *arguments, **options)

    monkeypatch.setattr(model, "denoise", denoise)
    return rows


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("name", "family"), [("dit_tiny", "dit"), ("sit_tiny", "sit")])
def test_the_original_guided_forward(name: str, family: str, execution: str) -> None:
    """The conditional half: guided in the first three channels, its own fourth channel and variance."""
    model, case = load_case(name, family)
    half = len(case["cfg_x"]) // 2
    field = GuidedField(model.set_execution(execution), case["cfg_y"][:half], Guidance(4.0))
    output = field(case["cfg_x"][:half], case["cfg_t"][:half])
    assert output.shape == case["cfg_out_scale4"][:half].shape
    assert float((output - case["cfg_out_scale4"][:half]).abs().max()) < 1e-4


class TestCombine:
    conditional = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    unconditional = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(1))

    def guided_channels(self, guidance: Guidance, noise_channels: int) -> list[int]:
        mixed = guidance.combine(self.conditional, self.unconditional, noise_channels)
        full = self.unconditional + guidance.scale * (self.conditional - self.unconditional)
        guided = [channel for channel in range(8) if torch.equal(mixed[:, channel], full[:, channel])]
        others = [channel for channel in range(8) if channel not in guided]
        assert torch.equal(mixed[:, others], self.conditional[:, others])
        return guided

    @pytest.mark.parametrize(
        ("channels", "noise_channels", "expected"),
        [("first3", 4, [0, 1, 2]), ("all", 4, [0, 1, 2, 3]), ("first3", 1, [0]), ("first3", 3, [0, 1, 2])],
    )
    def test_which_channels(self, channels: str, noise_channels: int, expected: list[int]) -> None:
        assert self.guided_channels(Guidance(3.0, channels), noise_channels) == expected

    @pytest.mark.parametrize(("original", "expected"), [(3, 3), (4, 4), (16, 4)])
    def test_the_familys_own_channels(self, original: int, expected: int) -> None:
        mixed = Guidance(3.0).combine(self.conditional, self.unconditional, 4, original)
        expected_mix = Guidance(3.0, "all").combine(self.conditional, self.unconditional, expected)
        assert torch.equal(mixed, expected_mix)

    def test_channels_of_videos_are_axis_2(self) -> None:
        videos = [part.unflatten(0, (1, 2)) for part in (self.conditional, self.unconditional)]
        mixed = Guidance(3.0).combine(*videos, 4, 4)
        frames = Guidance(3.0).combine(self.conditional, self.unconditional, 4, 4)
        assert torch.equal(mixed[0], frames)

    def test_the_inputs_stay(self) -> None:
        before = self.conditional.clone()
        Guidance(3.0).combine(self.conditional, self.unconditional, 4)
        assert torch.equal(self.conditional, before)


class TestBranches:
    state = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    time = torch.tensor(400)
    labels = torch.tensor([3, 7])

    def test_scale_1_runs_one_branch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("dit")
        rows = rows_of_each_call(model, monkeypatch)
        output = GuidedField(model, self.labels, Guidance(1.0))(self.state, self.time)
        assert rows == [2]
        assert torch.equal(output, model(self.state, self.time, self.labels).sample)

    def test_other_scales_run_two_in_one_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("dit")
        rows = rows_of_each_call(model, monkeypatch)
        GuidedField(model, self.labels, Guidance(1.5))(self.state, self.time)
        assert rows == [4]

    def test_scale_0_is_the_null_class(self) -> None:
        model = tiny_model("dit")
        output = GuidedField(model, self.labels, Guidance(0.0, "all"))(self.state, self.time)
        null = model(self.state, self.time, torch.tensor([10, 10])).sample
        torch.testing.assert_close(output[:, :4], null[:, :4], rtol=0, atol=1e-5)

    def test_learned_sigma_is_told_by_the_channels(self) -> None:
        assert GuidedField(tiny_model("dit"), self.labels, Guidance()).learned_sigma
        assert not GuidedField(tiny_model("dit", learn_sigma=False), self.labels, Guidance()).learned_sigma
        assert not GuidedField(tiny_model("sit"), self.labels, Guidance()).learned_sigma

    def test_predictions_are_fp32_in_half_precision_too(self) -> None:
        model = tiny_model("dit").to(torch.bfloat16)
        assert GuidedField(model, self.labels, Guidance(1.5))(self.state, self.time).dtype == torch.float32


class TestMeter:
    def test_mean_over_branches_and_evaluations(self) -> None:
        model, meter = tiny_model("dit").set_execution("compact"), RatioMeter()
        state, labels = TestBranches.state, TestBranches.labels
        expected = torch.zeros(2)
        for time in (100, 700):
            GuidedField(model, labels, Guidance(2.0), meter)(state, torch.tensor(time))
            for y in (labels, torch.tensor([10, 10])):
                expected += (
                    executed_ratio(model.routing(torch.full((2,), time), state, y), model.geometry) / 4
                )
        assert meter.evaluations == 2
        torch.testing.assert_close(meter.mean(2), expected)
        assert 0.05 < float(expected.mean()) < 0.95

    def test_a_static_model_executes_everything(self) -> None:
        field = GuidedField(tiny_model("dit").set_execution("static"), TestBranches.labels, Guidance(2.0))
        field(TestBranches.state, TestBranches.time)
        assert not field.dynamic
        assert torch.equal(field.meter.mean(2), torch.ones(2))


@pytest.mark.parametrize("execution", ["dense", "compact"])
class TestFrozen:
    """An ODE solver keeps the widths of an interval's start while tokens are decided at each state."""

    def test_at_its_own_time_nothing_changes(self, execution: str) -> None:
        model = tiny_model("sit").set_execution(execution)
        field = GuidedField(model, TestBranches.labels, Guidance(1.5))
        time = torch.tensor(0.3)
        torch.testing.assert_close(
            field.frozen(time)(TestBranches.state, time), field(TestBranches.state, time), rtol=0, atol=1e-5
        )

    def test_widths_stay_and_tokens_live(self, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("sit").set_execution(execution)
        seen = []
        original = model.denoise

        def denoise(*arguments: Any, **options: Any) -> Any:
            prediction, routing = original(*arguments, **options)
            seen.append(routing)
            return prediction, routing

        monkeypatch.setattr(model, "denoise", denoise)
        begin, later = torch.tensor(0.1), torch.tensor(0.9)
        field = GuidedField(model, TestBranches.labels, Guidance(1.5))
        field.frozen(begin)(TestBranches.state, later)
        field(TestBranches.state, later)
        frozen, live = seen
        widths = model.routing(begin)
        assert torch.equal(frozen.heads, widths.heads.expand_as(frozen.heads))
        assert torch.equal(frozen.groups, widths.groups.expand_as(frozen.groups))
        assert not torch.equal(frozen.heads, live.heads)
        assert 0 < float(frozen.tokens.mean()) < 1
