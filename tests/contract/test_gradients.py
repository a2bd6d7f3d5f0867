"""Training: gradients reach every router, and gradient checkpointing changes none of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dydit_cli.dynamic.gates import GumbelGating, RoutingNoise
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution import DenseExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family, reset_routers
from dydit_cli.flops import executed_ratio
from tests.tiny import bits, each_family, first_weight, router_names, tiny_inputs, tiny_model


def loss_and_routing(model: DynamicTransformer, step: int = 0) -> tuple[Tensor, Routing]:
    noise = RoutingNoise.draw(model.geometry, seed=0, step=step, indices=range(4))
    output, routing = model.denoise(
        *tiny_inputs(model, 4), executor=DenseExecutor(), gating=GumbelGating(noise)
    )
    return output.square().mean(), routing


def gradients(model: DynamicTransformer, *, with_ratio: bool = True) -> dict[str, Tensor]:
    model.zero_grad()
    loss, routing = loss_and_routing(model)
    if with_ratio:
        loss = loss + (executed_ratio(routing, model.geometry).mean() - 0.5) ** 2
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def name_in(model: DynamicTransformer, wanted: Tensor) -> str:
    """The name of a parameter."""
    return next(name for name, parameter in model.named_parameters() if parameter is wanted)


@each_family
@pytest.mark.parametrize("with_ratio", [False, True], ids=["prediction loss alone", "with the ratio"])
def test_gradients_reach_every_router_and_every_weight(family: Family, with_ratio: bool) -> None:
    model = tiny_model(family).train()
    found = gradients(model, with_ratio=with_ratio)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == expected
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    silent = {name for name, gradient in found.items() if not gradient.any()}
    assert not silent
    # Every unit's router row has a gradient of its own.
    for block in model.dynamic_blocks:
        for router in ("head_router", "channel_router"):
            assert (found[name_in(model, getattr(block, router).linear.bias)] != 0).all()


@each_family
def test_gradients_reach_the_routers_from_the_paper_start(family: Family) -> None:
    """With biases of 15 and 35 the gradient is small; a temperature of 5 leaves it well above rounding."""
    model = tiny_model(family).train()
    reset_routers(model)
    found = gradients(model)
    for block in model.dynamic_blocks:
        assert (found[name_in(model, block.head_router.linear.bias)].abs() > 1e-7).all()
        assert (found[name_in(model, block.token_router.score.bias)].abs() > 1e-9).all()


@each_family
def test_masks_of_training_are_exactly_zero_or_one(family: Family) -> None:
    model = tiny_model(family).train()
    _, routing = loss_and_routing(model)
    for mask in (routing.heads, routing.groups, routing.tokens):
        assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
        assert mask.requires_grad
    assert routing.heads[:, :, 0].all()
    assert routing.groups[:, :, 0].all()


@each_family
def test_gradient_checkpointing_changes_no_bit(family: Family) -> None:
    """A block that is replayed sees the same noise, embeddings and masks, because they are its arguments."""
    model = tiny_model(family).train()
    expected = gradients(model)
    loss = loss_and_routing(model)[0]
    model.enable_gradient_checkpointing()
    replays = 0

    def count(*_: object) -> None:
        nonlocal replays
        replays += 1

    hook = model.dynamic_blocks[1].register_forward_pre_hook(count)
    actual = gradients(model)
    hook.remove()
    assert replays == 2
    assert torch.equal(loss_and_routing(model)[0], loss)
    assert set(actual) == set(expected)
    for name, gradient in actual.items():
        assert torch.equal(bits(gradient), bits(expected[name])), name
    model.disable_gradient_checkpointing()
    name = name_in(model, first_weight(model.dynamic_blocks[0]))
    assert torch.equal(bits(gradients(model)[name]), bits(expected[name]))


@each_family
def test_noise_of_another_step_changes_the_draw(family: Family) -> None:
    model = tiny_model(family).train()
    assert not torch.equal(loss_and_routing(model, 0)[1].heads, loss_and_routing(model, 1)[1].heads)


@each_family
def test_parameter_lists_cover_what_trains(family: Family) -> None:
    model = tiny_model(family)
    routers, backbone = model.router_parameters(), model.backbone_parameters()
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in (*routers, *backbone)} == trained
    assert len(routers) + len(backbone) == len(trained)
    assert not any(
        parameter.requires_grad for parameter in model.parameters() if id(parameter) not in trained
    )
    assert "pos_embed" not in dict(model.named_parameters()) or not model.pos_embed.requires_grad
    assert len(routers) == len(list(router_names(model)))
