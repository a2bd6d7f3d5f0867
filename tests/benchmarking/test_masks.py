"""Masks that are imposed by setting routers: what is asked for is what runs."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.benchmarking.masks import Case, case_for_ratio, case_of, chosen, impose
from dydit_cli.errors import DyditError
from dydit_cli.families.registry import preset_named
from dydit_cli.flops import executed_ratio
from dydit_cli.randomness import generator
from tests.tiny import tiny_inputs, tiny_model, uniform_routing


@pytest.mark.parametrize("masks", ["prefix", "scattered"])
@pytest.mark.parametrize("case", [Case(2, 4, 0.7), Case(6, 6, 1.0), Case(1, 1, 0.0)])
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_the_routers_decide_as_asked(family: str, case: Case, masks: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(model, 4)
    impose(model, case, masks, [inputs], seed=0)
    _, routing = model.denoise(*inputs)
    assert (routing.heads.sum(-1) == case.heads).all()
    assert (routing.groups.sum(-1) == case.groups).all()
    kept = round(case.tokens * 4 * model.geometry.num_tokens)
    assert (routing.tokens.sum((0, 2)) == kept).all()
    if masks == "prefix":
        assert routing.heads[..., : case.heads].all()
    # Widths hold at any timestep, so that a plan finds nothing else.
    assert torch.equal(model.routing(inputs[1][0] / 2).heads[0], routing.heads[0])


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_masks_may_change_with_the_timestep(family: str) -> None:
    model = tiny_model(family)
    states, times, labels = tiny_inputs(model, 4)
    levels = [(states, time.expand(4), labels) for time in times]
    impose(model, Case(3, 3, 1.0), "changing", levels, seed=0)
    widths = [model.routing(time) for time in times]
    assert all(
        (routing.heads.sum(-1) == 3).all() and (routing.groups.sum(-1) == 3).all() for routing in widths
    )
    assert len({tuple(routing.heads.flatten().tolist()) for routing in widths}) == 4


def test_tokens_in_half_precision_are_near_the_share() -> None:
    model = tiny_model("dit").to(torch.bfloat16)
    inputs = tiny_inputs(model, 8)
    impose(model, Case(3, 3, 0.7), "scattered", [inputs], seed=0)
    _, routing = model.denoise(*inputs)
    assert float(routing.tokens.mean()) == pytest.approx(0.7, abs=0.05)


def test_scattered_units_leave_gaps_and_keep_the_first() -> None:
    masks = torch.stack([chosen(16, 8, True, generator(seed)) for seed in range(8)])
    assert (masks.sum(1) == 8).all()
    assert masks[:, 0].all()
    assert masks.unique(dim=0).shape[0] == 8
    assert torch.equal(chosen(4, 2, False, generator(0)), torch.tensor([1.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_a_ratio_is_met(ratio: float) -> None:
    family, config = preset_named("dit-xl/2")
    config["num_layers"] = 1
    with torch.device("meta"):
        geometry = family.model_class(**config).geometry
    case = case_for_ratio(geometry, ratio)
    kept = round(case.tokens * geometry.num_tokens)
    routing = uniform_routing(geometry, 1, heads=case.heads, groups=case.groups, tokens=kept)
    assert float(executed_ratio(routing, geometry)) == pytest.approx(ratio, abs=2e-3)
    assert case.groups / geometry.num_groups >= case.tokens - 0.2


def test_what_cannot_be() -> None:
    geometry = tiny_model("dit").geometry
    with pytest.raises(DyditError, match="A ratio of 0") as caught:
        case_for_ratio(geometry, 0.01)
    assert "One head is always on" in caught.value.why
    with pytest.raises(DyditError, match="7 heads cannot"):
        case_of(geometry, 7, None, 1.0)
    assert case_of(geometry, None, None, 1.0).words(geometry) == "everything on"
