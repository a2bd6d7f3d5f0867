"""Every family runs on packed weights alone, and gets its stored ones back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.execution.freeing import same_bits
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from tests.tiny import bits, each_family, predict, tiny_inputs, tiny_model


def ready(family: Family, **changes: object) -> DynamicModel:
    return tiny_model(family, **changes).requires_grad_(False).set_execution("compact")


@torch.no_grad()
def run(model: DynamicModel) -> Tensor:
    return predict(model, *tiny_inputs(model))


def held_bytes(model: DynamicModel) -> int:
    """Of all parameters that have memory, and of everything packed."""
    stored = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    return stored + model._executor.packed_bytes


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_back_bit_for_bit(family: Family, dtype: torch.dtype) -> None:
    model = ready(family).to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = run(model)
    assert torch.equal(bits(run(model.pack(free=True))), bits(expected))
    assert model.is_freed
    with pytest.raises(DyditError, match="given back"):
        model.set_execution("dense")
    twin = copy.deepcopy(model)
    assert torch.equal(bits(run(twin)), bits(expected))
    after = model.unpack().state_dict()
    assert list(after) == list(before)
    for key, tensor in after.items():
        assert same_bits(tensor, before[key]), key
    assert torch.equal(bits(run(model)), bits(expected))


@each_family
def test_weights_of_blocks_are_held_once(family: Family) -> None:
    model = ready(family)
    alone = held_bytes(model)
    assert held_bytes(model.pack()) > 1.25 * alone
    assert held_bytes(model.pack(free=True)) == alone
    sliced = [
        parameter
        for block in model.dynamic_blocks
        for layer, _ in block.sliced_layers()
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, torch.nn.Linear) and name == "weight"
    ]
    assert sliced
    assert all(parameter.is_meta for parameter in sliced)


@each_family
def test_ordered_widths_and_few_groups(family: Family) -> None:
    model = ready(family, width="ordered", num_groups=4)
    expected = run(model)
    assert torch.equal(bits(run(model.pack(free=True))), bits(expected))


@each_family
def test_a_changed_order_is_refused(family: Family) -> None:
    model = ready(family).pack(free=True)
    run(model)
    for name, order in model.named_buffers():
        if name.endswith("head_order"):
            order.copy_(order.flip(0))
    with pytest.raises(DyditError, match="while the model's stored weights are freed"):
        run(model)
