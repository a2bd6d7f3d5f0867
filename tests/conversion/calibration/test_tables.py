"""What is measured, shared out and fitted: tables of units by range of timesteps."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.conversion.calibration.allocation import allocate, ratio_of
from dydit_cli.conversion.calibration.fitting import LEVELS, fit_routers
from dydit_cli.conversion.calibration.sensitivity import GivenWidths, Samples, sensitivity
from dydit_cli.conversion.calibration.units import Units
from dydit_cli.data import open_data
from dydit_cli.dynamic.gates import CompleteGating, ImposedGating
from dydit_cli.families.family import Family
from dydit_cli.objectives import objective_for, objective_of
from tests.tiny import each_family, tiny_inputs, tiny_model

NOTHING = torch.zeros(4, dtype=torch.bool)
LAST = torch.tensor([False, False, False, True])


@each_family
def test_columns_are_all_units_and_their_costs_all_macs(family: Family) -> None:
    model = tiny_model(family)
    units = Units.of(model)
    assert float(units.costs(model.geometry, model.geometry.num_tokens).sum()) == pytest.approx(1, abs=1e-6)
    table = torch.rand(5, units.count) > 0.5
    assert torch.equal(units.table(units.routing(table.float(), 3)), table)
    named = {place.name for place in units.places}
    assert len(named) == len(units.places)
    assert int(units.always_on().sum()) == len(units.places) == int(units.lasts().sum())


@each_family
def test_given_widths_run_as_imposed_ones(family: Family) -> None:
    model = tiny_model(family)
    units = Units.of(model)
    sample, times, condition = tiny_inputs(model, 3)
    table = (torch.rand(3, units.count, generator=torch.Generator().manual_seed(0)) > 0.4) | units.always_on()
    dense = model.make_executor("dense")
    with torch.no_grad():
        _, complete = model.denoise(sample, times, condition, executor=dense, gating=CompleteGating())
        routing = units.routing(table.float(), complete.tokens.shape[2])
        expected, _ = model.denoise(sample, times, condition, executor=dense, gating=ImposedGating(routing))
        found, made = model.denoise(
            sample, times, condition, executor=dense, gating=GivenWidths(units.routing(table.float(), 1))
        )
    assert torch.equal(found, expected)
    assert torch.equal(units.table(made), table)


def test_what_costs_the_least_loss_a_mac_goes_first() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [8.0, 0.1, 2.0, 9.0]])
    costs = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    kept = allocate(torch.ones(2, 4, dtype=torch.bool), scores, costs, NOTHING, NOTHING, LAST, target=0.6)
    # By score per MAC: row 1 unit 1 (0.5), then units 2 of both rows (6.7; the first row first).
    assert kept.tolist() == [[True, True, False, True], [True, False, False, True]]
    assert float(ratio_of(kept, costs).mean()) == pytest.approx(0.6)


def test_fixed_units_stay_and_what_is_off_stays_off() -> None:
    fixed = torch.tensor([True, False, False, False])
    before = torch.tensor([[True, True, False, True]])
    costs = torch.full((4,), 0.25, dtype=torch.float64)
    kept = allocate(before, torch.tensor([[0.0, 1.0, 9.0, 2.0]]), costs, fixed, NOTHING, LAST, target=0.0)
    assert kept.tolist() == [[True, False, False, False]]


def test_nested_units_go_from_the_last() -> None:
    costs = torch.full((4,), 0.25, dtype=torch.float64)
    kept = allocate(
        torch.ones(1, 4, dtype=torch.bool),
        torch.tensor([[9.0, 0.0, 1.0, 5.0]]),
        costs,
        NOTHING,
        ~NOTHING,
        LAST,
        target=0.5,
    )
    assert kept.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("width", ["free", "ordered"])
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_routers_follow_a_table_that_grows_towards_the_image(family: str, width: str) -> None:
    model = tiny_model(family, width=width, hidden_size=96)
    units, objective = Units.of(model), objective_of(model)
    # Data lies at t = 0 of a diffusion and at t = 1 of a flow.
    rows = torch.arange(4) if objective.kind == "flow" else torch.arange(4).flip(0)
    rank = torch.cat([torch.arange(place.router.units) for place in units.places])
    table = rank[None] < rows[:, None] + 2
    costs = units.costs(model.geometry, model.geometry.num_tokens)
    target = float(ratio_of(table, costs).mean())
    fit = fit_routers(model, units, table, objective, target)
    assert fit.agreement > 0.9
    assert fit.ratio == pytest.approx(target, abs=0.02)
    with torch.no_grad():
        logits = model.blocks[0].head_router(model.embed_time(objective.grid(4 * LEVELS)))
    assert float(logits.abs().max()) < 10
    if width == "ordered":
        decided = units.table(model.routing(objective.grid(50)))
        heads = decided[:, units.places[0].columns].int()
        assert (heads.diff(dim=1) <= 0).all()


def test_units_that_do_nothing_have_no_score_and_gates_are_at_their_masks() -> None:
    config = {
        "sample_size": 32,
        "patch_size": 8,
        "in_channels": 1,
        "hidden_size": 24,
        "num_layers": 2,
        "num_attention_heads": 3,
    }
    model = tiny_model("dit", shuffled=False, **config).requires_grad_(False)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.view(24, 3, 8)[:, 1] = 0
    units = Units.of(model)
    source = open_data("fashion-mnist-subset", geometry=model.geometry).train
    samples = Samples(source, objective_for("dit"), ranges=2, per_range=3, seed=0)
    complete = sensitivity(model, units, units.everything(2), samples, turn=0)
    assert complete.shape == (2, units.count)
    assert (complete[:, 1] == 0).all()
    assert (complete[:, 0] > 0).all()
    assert not torch.equal(complete[0], complete[1])
    less = units.everything(2)
    less[0, 2] = False
    after = sensitivity(model, units, less, samples, turn=0)
    assert torch.equal(after[1], complete[1])
    assert not torch.equal(after[0], complete[0])
    in_parts = Samples(source, objective_for("dit"), ranges=2, per_range=3, seed=0, batch_size=2)
    torch.testing.assert_close(sensitivity(model, units, less, in_parts, turn=0), after, rtol=1e-4, atol=1e-9)
    assert not torch.equal(sensitivity(model, units, less, samples, turn=1), after)
