"""Packed weights follow their source: whatever changes the stored parameters is seen by the next compact forward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dydit_cli.dynamic.gates import ImposedGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import DenseExecutor
from dydit_cli.families.backbone import DynamicTransformer
from tests.tiny import random_routing, relative_difference, tiny_inputs, tiny_model

Edit = Callable[[DynamicTransformer], object]


def other_state(model: DynamicTransformer, seed: int = 5) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in tiny_model(model.family, seed=seed).state_dict().items()}


def edit_in_place(model: DynamicTransformer) -> None:
    """One value of one weight."""
    model.blocks[1].mlp.fc2.weight[3, 5] += 20


def edit_bias(model: DynamicTransformer) -> None:
    model.blocks[0].attn.proj.bias += 1
    model.blocks[2].mlp.fc1.bias += 1


def edit_order(model: DynamicTransformer) -> None:
    for block in model.blocks:
        block.attn.head_order.copy_(block.attn.head_order.flip(0))


def edit_channel_order(model: DynamicTransformer) -> None:
    for block in model.blocks:
        block.mlp.channel_order.copy_(block.mlp.channel_order.flip(0))


def replace_parameter(model: DynamicTransformer) -> None:
    model.blocks[0].attn.qkv.weight = nn.Parameter(model.blocks[0].attn.qkv.weight * 2)


def replace_layer(model: DynamicTransformer) -> None:
    model.blocks[0].mlp.fc1 = nn.Linear(48, 192)


def replace_block(model: DynamicTransformer) -> None:
    model.blocks[0] = copy.deepcopy(model.blocks[2])


def swap_data(model: DynamicTransformer) -> None:
    for block in model.blocks:
        block.attn.qkv.weight.data = block.attn.qkv.weight.data * 2


def load(model: DynamicTransformer) -> None:
    model.load_state_dict(other_state(model))


def load_assigned(model: DynamicTransformer) -> None:
    """Twice, so that the allocator may give the second state the addresses of the first weights."""
    for seed in range(2, 7):
        model.load_state_dict(other_state(model, seed), assign=True)


def cast_and_back(model: DynamicTransformer) -> None:
    """The values are rounded; the allocator is likely to give the last cast the first one's addresses."""
    for _ in range(3):
        model.to(torch.bfloat16)
        model.to(torch.float32)


def fuse_adapter(model: DynamicTransformer) -> None:
    """As peft merges a LoRA: in place and through ``.data``, which leaves the version as it was."""
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        for layer in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2):
            rows, columns = layer.weight.shape
            low_rank = torch.randn(rows, 2, generator=generator) @ torch.randn(
                2, columns, generator=generator
            )
            layer.weight.data += 0.1 * low_rank


def fused_optimiser_step(model: DynamicTransformer) -> None:
    """A fused step writes without a new version."""
    model.requires_grad_(True)
    with torch.enable_grad():
        model.set_execution("dense")(*tiny_inputs(model)).sample.square().mean().backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()
    model.requires_grad_(False)


def foreach_step(model: DynamicTransformer) -> None:
    torch._foreach_mul_(list(model.parameters()), 1.5)


EDITS: list[Edit] = [
    edit_in_place,
    edit_bias,
    edit_order,
    edit_channel_order,
    replace_parameter,
    replace_layer,
    replace_block,
    swap_data,
    load,
    load_assigned,
    cast_and_back,
    fuse_adapter,
    foreach_step,
]


@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
@torch.no_grad()
def test_an_edit_is_seen(edit: Edit) -> None:
    model = tiny_model().requires_grad_(False).set_execution("compact")
    arguments, gating = tiny_inputs(model), ImposedGating(random_routing(model.geometry, 3))
    before, _ = model.denoise(*arguments, gating=gating)
    edit(model)
    dense, _ = model.denoise(*arguments, executor=DenseExecutor(), gating=gating)
    after, _ = model.denoise(*arguments, gating=gating)
    assert not torch.equal(before, after)
    assert relative_difference(after, dense) < 1e-5


@torch.no_grad()
def test_a_fused_optimiser_step_is_seen() -> None:
    model = tiny_model()
    executor = model.set_execution("compact")._executor
    arguments, gating = tiny_inputs(model), ImposedGating(random_routing(model.geometry, 3))
    model.denoise(*arguments, executor=executor, gating=gating)
    fused_optimiser_step(model)
    dense, _ = model.denoise(*arguments, executor=DenseExecutor(), gating=gating)
    after, _ = model.denoise(*arguments, executor=executor, gating=gating)
    assert relative_difference(after, dense) < 1e-5


@torch.no_grad()
def test_a_cast_is_seen() -> None:
    model = tiny_model().set_execution("compact")
    arguments, gating = tiny_inputs(model), ImposedGating(random_routing(model.geometry, 3))
    model.denoise(*arguments, gating=gating)
    model.to(torch.bfloat16)
    dense, _ = model.denoise(*arguments, executor=DenseExecutor(), gating=gating)
    after, _ = model.denoise(*arguments, gating=gating)
    assert after.dtype == torch.bfloat16
    assert relative_difference(after, dense) < 2e-2


@torch.no_grad()
def test_casting_or_moving_releases_what_was_packed() -> None:
    """Else a model moved off an accelerator would keep its packed copy there."""
    model = tiny_model().set_execution("compact")
    model(*tiny_inputs(model))
    executor = model._executor
    assert executor.packed_bytes > 0
    model.to(torch.bfloat16)
    assert executor.packed_bytes == 0
    assert model.execution == "compact"


@torch.no_grad()
def test_unmerged_adapters_are_refused_rather_than_ignored() -> None:
    """Compact execution reads weights; a layer that computes more than its weight says must not lose the rest silently."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.base(inputs) + 1

    model = tiny_model().set_execution("compact")
    model.blocks[1].mlp.fc1 = Adapted(model.blocks[1].mlp.fc1)
    with pytest.raises(DyditError, match="Adapted"):
        model(*tiny_inputs(model))
    assert torch.isfinite(model.set_execution("dense")(*tiny_inputs(model)).sample).all()
