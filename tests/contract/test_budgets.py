"""Models with budgets: nothing changes at the start, and both executions, plans and artifacts follow the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import load_model, save_model
from dydit_cli.dynamic.gates import FrozenWidthGating, GumbelGating, RoutingNoise, ThresholdGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from dydit_cli.training.budgets import with_budgets
from tests.tiny import TINY, bits, relative_difference, tiny_inputs, tiny_model

BUDGETED = [family for family in TINY if issubclass(family.model_class, DynamicTransformer)]
each_budgeted_family = pytest.mark.parametrize("family", BUDGETED, ids=[family.name for family in BUDGETED])
RANGE = {"budgets": [0.3, 1.0], "default_budget": 0.5}


@each_budgeted_family
def test_a_model_that_is_given_budgets_computes_what_it_did(family: Family) -> None:
    model = tiny_model(family)
    extended = with_budgets(model, (0.3, 1.0), 0.5).eval()
    assert extended.budget == 0.5
    assert extended.budget_router.gain > 0
    with torch.no_grad():
        before, after = (
            one.denoise(*tiny_inputs(model), executor=DenseExecutor())[0] for one in (model, extended)
        )
    assert torch.equal(bits(before), bits(after))


@each_budgeted_family
@pytest.mark.parametrize("planned", [False, True])
def test_compact_follows_the_budget_as_dense_does(family: Family, planned: bool) -> None:
    model = tiny_model(family, **RANGE)
    sample, times, condition = tiny_inputs(model)
    outputs = []
    for budget in (0.35, 0.9, 0.35):
        model.set_budget(budget).set_execution("compact")
        if planned:
            model.plan(times[:1])
        with torch.no_grad():
            compact, routing = model.denoise(sample, times[0], condition)
            dense, expected = model.denoise(sample, times[0], condition, executor=DenseExecutor())
        assert torch.equal(routing.heads, expected.heads)
        assert torch.equal(routing.tokens, expected.tokens)
        assert relative_difference(compact, dense) <= 1e-5
        outputs.append(dense)
    assert relative_difference(outputs[0], outputs[1]) > 1e-3
    assert torch.equal(outputs[0], outputs[2])


@each_budgeted_family
def test_training_tells_its_own_budget_and_reaches_the_router(family: Family) -> None:
    model = tiny_model(family, **RANGE)
    noise = RoutingNoise.draw(model.geometry, seed=0, step=0, indices=range(3))

    def routed(budget: float | None) -> torch.Tensor:
        gating = GumbelGating(noise, scale=0.0, budget=budget)
        _, routing = model.denoise(*tiny_inputs(model), executor=DenseExecutor(), gating=gating)
        return routing.heads.sum() + routing.tokens.sum()

    assert routed(None).item() == routed(0.5).item()
    assert routed(0.3).item() != routed(1.0).item()
    routed(0.4).backward()
    assert model.budget_router.linear.weight.grad.abs().sum() > 0


@each_budgeted_family
def test_artifacts_keep_budgets_and_their_default(family: Family, tmp_path: Path) -> None:
    model = tiny_model(family, **RANGE)
    model.budget_router.ratios = torch.tensor(model.budget_router.knots()) + 0.01
    model.budget_router.shifts = torch.linspace(-1, 1, len(model.budget_router.shifts))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.budget == 0.5
    assert torch.equal(loaded.budget_router.ratios, model.budget_router.ratios)
    assert torch.equal(loaded.budget_router.shifts, model.budget_router.shifts)
    assert load_model(tmp_path, budget=0.7).budget == 0.7
    with pytest.raises(DyditError, match="outside the range"):
        load_model(tmp_path, budget=0.2)


@each_budgeted_family
def test_a_model_without_budgets_refuses_one(family: Family) -> None:
    with pytest.raises(DyditError, match="no budgets"):
        tiny_model(family).set_budget(0.5)


@each_budgeted_family
def test_a_correction_is_a_dial_at_its_budget(family: Family) -> None:
    """Live, planned, asked without an image, and with widths from elsewhere: as ``keep_bias`` by the same number."""
    model, dialled = (tiny_model(family, **RANGE) for _ in range(2))
    model.budget_router.shifts[:] = 0.7
    dialled.set_keep_bias(0.7)
    sample, times, condition = tiny_inputs(model)
    with torch.no_grad():
        for execution in ("dense", "compact"):
            (one, routing), (other, expected) = (
                each.set_execution(execution).denoise(sample, times[0], condition)
                for each in (model, dialled)
            )
            assert torch.equal(bits(one), bits(other))
            assert torch.equal(routing.groups, expected.groups)
        plan = model.plan(times[:1])
        planned, _ = model.denoise(sample, times[0], condition)
        assert (plan.hits, plan.misses) == (1, 0)
        assert relative_difference(planned, one) <= 1e-6
        assert torch.equal(model.routing(times[0]).heads, dialled.routing(times[0]).heads)
        frozen = FrozenWidthGating(expected, ThresholdGating())
        _, live = model.denoise(sample, times[0], condition, executor=DenseExecutor(), gating=frozen)
        assert torch.equal(live.tokens, expected.tokens)


@each_budgeted_family
def test_a_change_of_the_router_drops_the_plan(family: Family) -> None:
    model = tiny_model(family, **RANGE).set_execution("compact")
    sample, times, condition = tiny_inputs(model)
    plan = model.plan(times[:1])
    with torch.no_grad():
        model.denoise(sample, times[0], condition)
        model.budget_router.linear.bias += 0.5
        model.denoise(sample, times[0], condition)
    assert model.current_plan is not plan


def test_an_executor_of_ones_own_sees_the_budget() -> None:
    model = tiny_model("dit", **RANGE)
    executor = CompactExecutor()
    with torch.no_grad():
        first = model.set_budget(0.35).denoise(*tiny_inputs(model), executor=executor)[0]
        second = model.set_budget(0.9).denoise(*tiny_inputs(model), executor=executor)[0]
        dense = model.denoise(*tiny_inputs(model), executor=DenseExecutor())[0]
    assert relative_difference(second, dense) <= 1e-5
    assert not torch.equal(first, second)
