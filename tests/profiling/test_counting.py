"""The formula against two public counters, on the graphs that really run."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.dynamic.gates import ImposedGating
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.families.family import Family
from dydit_cli.families.registry import preset_named
from dydit_cli.profiling import counting
from dydit_cli.profiling.counting import AGREEMENT, CountedMacs, ImposedForward, count_compact, count_static
from tests.tiny import (
    each_family,
    random_routing,
    relative_difference,
    tiny_inputs,
    tiny_model,
    uniform_routing,
)


@each_family
def test_the_static_model(family: Family) -> None:
    model = tiny_model(family)
    counted = count_static(model, *tiny_inputs(model))
    assert counted.fvcore == pytest.approx(counted.formula, rel=AGREEMENT)
    assert counted.torch == pytest.approx(counted.formula_without_layernorm, rel=AGREEMENT)
    assert counted.formula > counted.formula_without_layernorm
    assert counted.agrees


@each_family
@pytest.mark.parametrize("shared", [True, False], ids=["one width a batch", "a width an image"])
def test_the_compact_graph(family: Family, shared: bool) -> None:
    """Equal, routers included, for masks with gaps that differ from image to image."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, 4)
    routing = random_routing(model.geometry, 4, shared=shared)
    counted = count_compact(model, routing, *inputs)
    assert counted.deviation < 1e-6
    assert counted.formula < count_static(model, *inputs).formula


CORNERS = {
    "nothing but the always-on units": (1, 1, 0),
    "no head": (0, 3, 8),
    "no group": (3, 0, 8),
    "everything": (6, 6, 16),
}


@pytest.mark.parametrize("corner", CORNERS.values(), ids=list(CORNERS))
def test_corners_of_the_compact_graph(corner: tuple[int, int, int]) -> None:
    model = tiny_model()
    heads, groups, tokens = corner
    routing = uniform_routing(model.geometry, 2, heads=heads, groups=groups, tokens=tokens)
    assert count_compact(model, routing, *tiny_inputs(model, 2)).deviation < 1e-6


def test_other_shapes_are_counted_too() -> None:
    """Groups that are not as many as heads, an MLP that is not 4C, no learned sigma, no always-on unit."""
    model = tiny_model(num_groups=8, mlp_hidden_size=64, learn_sigma=False, always_on=False)
    inputs = tiny_inputs(model)
    assert count_static(model, *inputs).agrees
    assert count_compact(model, random_routing(model.geometry, 3), *inputs).deviation < 1e-6


def test_dense_execution_is_counted_in_full() -> None:
    """The counters would notice if compact execution did not skip anything."""
    model = tiny_model()
    inputs = tiny_inputs(model)
    routing = random_routing(model.geometry, 3)
    dense = counting._count(ImposedForward(model, DenseExecutor(), ImposedGating(routing)), inputs, routing)
    assert dense.torch > 1.2 * dense.formula_without_layernorm
    assert not dense.agrees


def test_the_wrapper_returns_the_prediction_and_every_router_s_logits() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    routing = random_routing(model.geometry, 3)
    with torch.no_grad():
        prediction, *logits = ImposedForward(model, CompactExecutor(), ImposedGating(routing))(*inputs)
        expected, _ = model.denoise(*inputs, executor=DenseExecutor(), gating=ImposedGating(routing))
    assert relative_difference(prediction, expected) < 1e-5
    assert len(logits) == 3 * model.geometry.depth


def test_agreement_is_judged_by_each_counter() -> None:
    assert CountedMacs(1000.0, 1000.9, 900.0, 900.0).agrees
    assert not CountedMacs(1000.0, 1001.1, 900.0, 900.0).agrees
    assert not CountedMacs(1000.0, 1000.0, 900.0, 898.0).agrees


@pytest.mark.slow
def test_dit_xl_itself() -> None:
    family, config = preset_named("dit-xl/2")
    model = family.build(config).eval()
    inputs = (torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.tensor([0]))
    static = count_static(model, *inputs)
    assert static.fvcore == pytest.approx(118.6887e9, rel=1e-6)
    assert static.torch == pytest.approx(118.6214e9, rel=1e-6)
    routing = uniform_routing(model.geometry, 1, heads=8, groups=11, tokens=179)
    assert count_compact(model, routing, *inputs).deviation < 1e-6
