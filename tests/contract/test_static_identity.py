"""All units on is the static model, bit for bit in dense execution, whatever the order of units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dydit_cli.dynamic.gates import CompleteGating, GumbelGating, ImposedGating, RoutingNoise
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.execution import EXECUTIONS, CompactExecutor, DenseExecutor, StaticExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family, reset_routers
from tests.tiny import (
    bits,
    each_family,
    orders,
    predict,
    random_routing,
    relative_difference,
    tiny_inputs,
    tiny_model,
    uniform_routing,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@each_family
@DTYPES
@torch.no_grad()
def test_complete_dense_is_static_bit_for_bit(family: Family, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    arguments = tiny_inputs(model)
    static, routing = model.denoise(*arguments, executor=StaticExecutor(), gating=CompleteGating())
    assert routing.heads.all()
    assert routing.groups.all()
    assert routing.tokens.all()
    for gating in (
        CompleteGating(),
        ImposedGating(uniform_routing(model.geometry, 3)),
    ):
        dense, _ = model.denoise(*arguments, executor=DenseExecutor(), gating=gating)
        assert torch.equal(bits(dense), bits(static))
    assert static.dtype == dtype
    assert torch.isfinite(static).all()


@each_family
@torch.no_grad()
def test_the_dial_at_infinity_is_static_bit_for_bit(family: Family) -> None:
    model = tiny_model(family)
    arguments = tiny_inputs(model)
    static = predict(model.set_execution("static"), *arguments)
    live = predict(model.set_execution("dense"), *arguments)
    assert not torch.equal(live, static)
    assert torch.equal(bits(predict(model.set_keep_bias(float("inf")), *arguments)), bits(static))


@each_family
@torch.no_grad()
def test_the_paper_start_keeps_everything(family: Family) -> None:
    """Straight after a conversion, by threshold and by (nearly every) noisy draw."""
    model = tiny_model(family)
    reset_routers(model)
    arguments = tiny_inputs(model)
    static = predict(model.set_execution("static"), *arguments)
    assert torch.equal(bits(predict(model.set_execution("dense"), *arguments)), bits(static))
    noise = RoutingNoise.draw(model.geometry, seed=0, step=0, indices=range(3))
    _, routing = model.denoise(*arguments, executor=DenseExecutor(), gating=GumbelGating(noise))
    assert float(routing.heads.mean()) == float(routing.groups.mean()) == float(routing.tokens.mean()) == 1.0


def with_identity_order(model: DynamicTransformer) -> DynamicTransformer:
    """The same weights in their natural order of importance."""
    for order in orders(model).values():
        order.copy_(torch.arange(len(order)))
    return model


@each_family
@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_any_order_preserves_the_complete_function(family: Family, execution: str) -> None:
    shuffled, natural = tiny_model(family), with_identity_order(tiny_model(family))
    assert not torch.equal(
        shuffled.dynamic_blocks[0].attn.head_order, natural.dynamic_blocks[0].attn.head_order
    )
    arguments = tiny_inputs(shuffled)
    outputs = [
        predict(model.set_keep_bias(float("inf")).set_execution(execution), *arguments)
        for model in (shuffled, natural)
    ]
    if execution == "compact":
        assert relative_difference(*outputs) < 1e-5
    else:
        assert torch.equal(bits(outputs[0]), bits(outputs[1]))


@each_family
@pytest.mark.parametrize("executor", [DenseExecutor, CompactExecutor])
@torch.no_grad()
def test_any_order_of_heads_preserves_the_masked_function(
    family: Family, executor: type[DenseExecutor] | type[CompactExecutor]
) -> None:
    """A mask by rank in one order, and the mask of the same stored heads by rank in another, compute the same."""
    shuffled, natural = tiny_model(family), tiny_model(family)
    for block in natural.dynamic_blocks:
        block.attn.head_order.copy_(torch.arange(6))
    arguments = tiny_inputs(shuffled)
    by_rank = random_routing(shuffled.geometry, 3)
    by_source = Routing(
        tuple(
            replace(
                masks, heads=torch.zeros_like(masks.heads).index_copy(1, block.attn.head_order, masks.heads)
            )
            for block, masks in zip(shuffled.dynamic_blocks, by_rank.blocks, strict=True)
        )
    )
    for masks, other, block in zip(by_rank.blocks, by_source.blocks, shuffled.dynamic_blocks, strict=True):
        # Rank r of the one is the stored head head_order[r] of the other.
        assert torch.equal(other.heads[:, block.attn.head_order], masks.heads)
    first, _ = shuffled.denoise(*arguments, executor=executor(), gating=ImposedGating(by_rank))
    second, _ = natural.denoise(*arguments, executor=executor(), gating=ImposedGating(by_source))
    assert relative_difference(first, second) < 1e-5


def moved_groups(masks: BlockRouting, permutation: torch.Tensor) -> BlockRouting:
    """The masks of groups in another order."""
    context = masks.context_groups
    return replace(
        masks,
        groups=masks.groups[:, permutation],
        context_groups=None if context is None else context[:, permutation],
    )


@each_family
@pytest.mark.parametrize("executor", [DenseExecutor, CompactExecutor])
@torch.no_grad()
def test_groups_follow_the_channel_order(
    family: Family, executor: type[DenseExecutor] | type[CompactExecutor]
) -> None:
    """Group g is the stored channels channel_order[g * width : (g + 1) * width]: permuting whole groups, or the channels
    inside one, and the mask along with them, changes nothing; permuting channels across groups does."""
    model = tiny_model(family)
    arguments, routing = tiny_inputs(model), random_routing(model.geometry, 3)
    expected, _ = model.denoise(*arguments, executor=executor(), gating=ImposedGating(routing))
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = Routing(tuple(moved_groups(block, permutation) for block in routing.blocks))
    channel_orders = [order for name, order in orders(model).items() if name.endswith("channel_order")]
    for order in channel_orders:
        order.copy_(order.view(6, -1)[permutation].flip(1).reshape(-1))
    actual, _ = model.denoise(*arguments, executor=executor(), gating=ImposedGating(moved))
    assert relative_difference(actual, expected) < 1e-5
    for order in channel_orders:
        order.copy_(order.roll(7))
    across, _ = model.denoise(*arguments, executor=executor(), gating=ImposedGating(moved))
    assert relative_difference(across, expected) > 1e-3
