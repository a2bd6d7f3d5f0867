"""The formula against torch's own counter on what really runs, and against the published totals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dydit_cli.dynamic.gates import Gating, ImposedGating, ThresholdGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routers import WidthRouter
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution import CompactExecutor, Executor, StaticExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from dydit_cli.flops import attention_macs, count_macs, executed_ratio, macs_of, mlp_macs, ratio_floor
from tests.tiny import each_family, predict, random_routing, tiny_inputs, tiny_model, uniform_routing

XL = Geometry(
    hidden_size=1152,
    depth=28,
    num_heads=16,
    num_groups=16,
    mlp_hidden=4608,
    num_tokens=256,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    sample_size=32,
    num_classes=1000,
)


def counted(model: DynamicTransformer, executor: Executor, gating: Gating) -> tuple[float, Routing]:
    """MACs of one image by torch's counter, which counts a multiplication and an addition as two."""
    arguments = tiny_inputs(model, 4)
    counter = FlopCounterMode(display=False)
    # The fused kernel of the CPU has no entry in the counter of every release; its unfused form has.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        _, routing = model.denoise(*arguments, executor=executor, gating=gating)
    return counter.get_total_flops() / 2 / 4, routing


@each_family
def test_static_forward(family: Family) -> None:
    model = tiny_model(family)
    found, _ = counted(model, StaticExecutor(), ThresholdGating())
    report = count_macs(model)
    assert report.routers == 0
    assert found == pytest.approx(report.total_without_layernorm, rel=1e-3)


@each_family
@pytest.mark.parametrize("changes", [{}, {"always_on": False}, {"num_groups": 4}, {"mlp_hidden_size": 96}])
@pytest.mark.parametrize("seed", range(2))
def test_compact_forward(family: Family, changes: dict[str, object], seed: int) -> None:
    """What compact execution really multiplies is the formula, routers included."""
    model = tiny_model(family, seed=seed, **changes)
    for gating in (ThresholdGating(), ImposedGating(random_routing(model.geometry, 4, seed))):
        found, routing = counted(model, CompactExecutor(), gating)
        report = count_macs(model, routing)
        assert report.total < 0.9 * count_macs(model).total
        assert found == pytest.approx(report.total_without_layernorm, rel=1e-3)


@each_family
def test_a_planned_forward_asks_no_width_router(family: Family) -> None:
    model = tiny_model(family).set_execution("compact")
    images, _, condition = tiny_inputs(model, 4)
    # Distinct classes, so that no two samples share their adaLN values.
    labels = torch.arange(4) if isinstance(condition, Tensor) else condition
    model.plan([0.5])

    def count() -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predict(model, images, 0.5, labels)
        return counter.get_total_flops() / 2

    planned = count()
    model.set_execution("dense").set_execution("compact")
    routers = [module for module in model.modules() if isinstance(module, WidthRouter)]
    assert count() - planned == 4 * sum(router.linear.weight.numel() for router in routers)


@each_family
def test_ratio_is_executed_over_static(family: Family) -> None:
    geometry = tiny_model(family).geometry
    routing = random_routing(geometry, 5)
    ratio = executed_ratio(routing, geometry)
    assert ratio.shape == (5,)
    report = macs_of(geometry, routing)
    assert float(ratio.mean()) == pytest.approx(report.routed / macs_of(geometry).routed, rel=1e-6)
    complete = uniform_routing(geometry, 2)
    assert executed_ratio(complete, geometry).tolist() == [1.0, 1.0]


@each_family
def test_floor_is_what_the_least_routing_executes(family: Family) -> None:
    geometry = tiny_model(family).geometry
    least = uniform_routing(geometry, 1, heads=1, groups=1, tokens=0)
    assert ratio_floor(geometry) == pytest.approx(float(executed_ratio(least, geometry)), rel=1e-6)
    assert 0 < ratio_floor(geometry) < 0.2
    assert ratio_floor(replace(geometry, always_on=False)) == 0.0


def test_ratio_has_the_gradient_of_the_masks() -> None:
    """Each mask value's share: a head costs attention / H / (attention + MLP) of one block of L."""
    geometry = replace(XL, depth=2)
    routing = uniform_routing(geometry, 3, heads=8, groups=4, tokens=128).map(
        lambda mask: mask.clone().requires_grad_()
    )
    executed_ratio(routing, geometry).sum().backward()
    attention, mlp = attention_macs(geometry), mlp_macs(geometry)
    whole = geometry.depth * (attention + mlp)
    for block in routing.blocks:
        torch.testing.assert_close(block.heads.grad, torch.full((3, 16), attention / 16 / whole))
        torch.testing.assert_close(block.groups.grad, torch.full((3, 16), mlp / 16 * 0.5 / whole))
        torch.testing.assert_close(block.tokens.grad, torch.full((3, 256), mlp / 256 * 0.25 / whole))


def test_published_total_of_dit_xl() -> None:
    report = macs_of(XL)
    assert report.total / 1e9 == pytest.approx(118.6887, abs=5e-5)
    assert report.total_without_layernorm / 1e9 == pytest.approx(118.6214, abs=5e-5)
    assert report.attention == 28 * (4 * 256 * 1152**2 + 2 * 256**2 * 1152)
    assert report.mlp == 28 * 8 * 256 * 1152**2


def test_xl_floor_leaves_room_for_the_papers_least_target() -> None:
    assert ratio_floor(XL) == pytest.approx(1 / 16 * (4 * 1152 + 512) / (12 * 1152 + 512))
    assert ratio_floor(XL) < 0.3
