"""Ordered width: the contract of any model holds, and slicing never copies a weight."""

from __future__ import annotations

from pathlib import Path

import torch

from dydit_cli.artifacts import load_model, save_model
from dydit_cli.dynamic.gates import CompleteGating, GumbelGating, ImposedGating, RoutingNoise
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution import CompactExecutor, DenseExecutor, StaticExecutor
from dydit_cli.families.family import Family
from dydit_cli.flops import executed_ratio
from tests.tiny import bits, each_family, predict, relative_difference, tiny_inputs, tiny_model


def are_prefixes(routing: Routing) -> bool:
    """Of heads, of groups, and of the groups of an MLP for text where a block has one."""
    masks = [mask for block in routing.blocks for mask in (block.heads, block.groups, block.context_groups)]
    return all(bool((mask[:, 1:] <= mask[:, :-1]).all()) for mask in masks if mask is not None)


@each_family
def test_masks_are_prefixes_that_change_over_a_schedule(family: Family) -> None:
    model = tiny_model(family, width="ordered")
    steps = torch.linspace(0, 1, 20) * (999 if family.objective == "diffusion" else 1)
    routing = model.routing(steps)
    assert are_prefixes(routing)
    assert len({tuple(mask.flatten().tolist()) for mask in routing.heads}) > 1


@each_family
def test_masks_are_prefixes_in_training_with_gradients(family: Family) -> None:
    model = tiny_model(family, width="ordered")
    noise = RoutingNoise.draw(model.geometry, seed=0, step=0, indices=range(3))
    prediction, routing = model.denoise(
        *tiny_inputs(model), executor=DenseExecutor(), gating=GumbelGating(noise)
    )
    assert are_prefixes(routing)
    (prediction.square().mean() + executed_ratio(routing, model.geometry).mean()).backward()
    for name, parameter in model.named_parameters():
        if "head_router" in name or "channel_router" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@each_family
def test_compact_equals_dense_and_complete_equals_static(family: Family) -> None:
    model = tiny_model(family, width="ordered")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        dense, routing = model.denoise(*inputs, executor=DenseExecutor())
        compact, _ = model.denoise(*inputs, executor=CompactExecutor(), gating=ImposedGating(routing))
        static, _ = model.denoise(*inputs, executor=StaticExecutor(), gating=CompleteGating())
        complete, _ = model.denoise(*inputs, executor=DenseExecutor(), gating=CompleteGating())
    assert relative_difference(compact, dense) <= 1e-5
    assert torch.equal(bits(complete), bits(static))


@each_family
def test_a_plan_copies_no_weight(family: Family) -> None:
    """The same schedule with free masks does, which is what makes this able to fail."""
    steps = torch.linspace(0, 1, 16) * (999 if family.objective == "diffusion" else 1)
    copied = {}
    for width in ("free", "ordered"):
        model = tiny_model(family, width=width).set_execution("compact")
        plan = model.plan(steps)
        if width == "ordered":
            assert set(plan.policies) == {"prefix"}
        executor = model._executor
        assert isinstance(executor, CompactExecutor)
        sample, _, condition = tiny_inputs(model)
        with torch.no_grad():
            for t in steps:
                predict(model, sample, t, condition)
        assert plan.misses == 0
        copied[width] = executor.copied_bytes
    assert copied["ordered"] == 0
    assert copied["free"] > 0


@each_family
def test_an_artifact_keeps_its_width(family: Family, tmp_path: Path) -> None:
    model = tiny_model(family, width="ordered")
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, execution="dense")
    assert loaded.config["width"] == "ordered"
    with torch.no_grad():
        before, after = (
            one.denoise(*tiny_inputs(model), executor=DenseExecutor())[0] for one in (model, loaded)
        )
    assert torch.equal(bits(before), bits(after))
