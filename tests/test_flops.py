"""The formula of multiply-accumulates: published totals, the ratio that training steers, and its floor."""

from __future__ import annotations

import pytest
import torch

from dydit_cli import count_macs
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.families.registry import FAMILIES, preset_named
from dydit_cli.flops import attention_macs, executed_ratio, macs_of, mlp_macs, ratio_floor, router_macs
from tests.tiny import random_routing, tiny_inputs, tiny_model, uniform_routing

# (preset, GMACs as the paper prints them in its "GFLOPs" column)
PUBLISHED = [("dit-s/2", 6.07), ("dit-b/2", 23.02), ("dit-xl/2", 118.69)]


def geometry_of(preset: str) -> Geometry:
    """A preset's geometry, without making its weights."""
    family, config = preset_named(preset)
    with torch.device("meta"):
        return family.model_class(**config).geometry


@pytest.fixture(scope="module")
def small() -> Geometry:
    return Geometry(
        hidden_size=48,
        depth=3,
        num_heads=6,
        num_groups=4,
        mlp_hidden=96,
        num_tokens=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        num_classes=10,
    )


@pytest.mark.parametrize(("preset", "gmacs"), PUBLISHED)
def test_published_totals(preset: str, gmacs: float) -> None:
    assert round(macs_of(geometry_of(preset)).total / 1e9, 2) == gmacs


def test_dit_xl_to_the_digit() -> None:
    report = macs_of(geometry_of("dit-xl/2"))
    assert report.total == pytest.approx(118.6887e9, rel=1e-6)
    assert report.total_without_layernorm == pytest.approx(118.6214e9, rel=1e-6)
    assert report.routers == 0


def test_a_static_model_costs_no_routers_and_a_complete_routing_does(small: Geometry) -> None:
    everything = uniform_routing(small, 2, heads=6, groups=4, tokens=16)
    static, complete = macs_of(small), macs_of(small, everything)
    assert complete.total - static.total == pytest.approx(small.depth * router_macs(small))
    assert complete.routed == pytest.approx(static.routed)


def test_router_macs_by_hand(small: Geometry) -> None:
    # 5 head rows and 3 group rows on one embedding; 48 -> 3 -> 1 on each of 16 tokens.
    assert router_macs(small) == 48 * (5 + 3) + 16 * (48 * 3 + 3)


def test_the_ratio_is_the_quotient_of_the_counts(small: Geometry) -> None:
    routing = random_routing(small, 4)
    expected = macs_of(small, routing).routed / macs_of(small).routed
    assert float(executed_ratio(routing, small).mean()) == pytest.approx(expected, rel=1e-6)


def test_the_ratio_by_hand(small: Geometry) -> None:
    routing = uniform_routing(small, 1, heads=3, groups=1, tokens=8)
    attention, mlp = attention_macs(small), mlp_macs(small)
    assert attention == 4 * 16 * 48**2 + 2 * 16**2 * 48
    assert mlp == 2 * 16 * 48 * 96
    expected = (attention / 2 + mlp / 4 / 2) / (attention + mlp)
    assert executed_ratio(routing, small).tolist() == pytest.approx([expected])


def test_the_ratio_is_one_for_everything_and_the_floor_for_the_least(small: Geometry) -> None:
    assert executed_ratio(uniform_routing(small, 2, heads=6, groups=4, tokens=16), small).tolist() == (
        pytest.approx([1.0, 1.0])
    )
    least = uniform_routing(small, 1, heads=1, groups=1, tokens=0)
    assert float(executed_ratio(least, small)) == pytest.approx(ratio_floor(small))


def test_without_an_always_on_unit_the_floor_is_zero(small: Geometry) -> None:
    free = Geometry(**{**small.__dict__, "always_on": False})
    assert ratio_floor(free) == 0
    nothing = uniform_routing(free, 1, heads=0, groups=0, tokens=0)
    assert float(executed_ratio(nothing, free)) == 0


def test_the_ratio_has_the_gradient_of_every_mask(small: Geometry) -> None:
    masks = [torch.full((2, size), 0.5, requires_grad=True) for size in (6, 4, 16)]
    routing = Routing((BlockRouting(*masks),) * small.depth)
    executed_ratio(routing, small).sum().backward()
    attention, mlp = attention_macs(small), mlp_macs(small)
    heads = attention / 6 / (attention + mlp)
    assert torch.allclose(masks[0].grad, torch.full((2, 6), heads))
    groups = mlp / 4 * 0.5 / (attention + mlp)
    assert torch.allclose(masks[1].grad, torch.full((2, 4), groups))


def test_groups_and_tokens_of_a_sample_are_multiplied_before_the_mean(small: Geometry) -> None:
    # One image with all groups and no token, one with no group and all tokens: no MLP at all, though both means are a half.
    heads = torch.ones(2, 6)
    groups = torch.tensor([[1.0] * 4, [0.0] * 4])
    tokens = torch.tensor([[0.0] * 16, [1.0] * 16])
    routing = Routing((BlockRouting(heads, groups, tokens),) * small.depth)
    assert macs_of(small, routing).mlp == 0


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_the_public_function_counts_a_model(family) -> None:
    model = tiny_model(family)
    _, routing = model.denoise(*tiny_inputs(model))
    static, dynamic = count_macs(model), count_macs(model, routing)
    assert 0 < dynamic.routed < static.routed
    assert dynamic.routers > 0 == static.routers
