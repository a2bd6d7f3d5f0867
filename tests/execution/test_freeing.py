"""Stored weights that were given back: inference goes on with the packed ones, everything else says how to get them back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dydit_cli
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor, DenseExecutor, StaticExecutor
from dydit_cli.execution.freeing import free_weights, same_bits
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from tests.execution.backbones import each_backbone
from tests.tiny import bits, relative_difference, tiny_inputs, tiny_model

TIMES = [float(t) for t in range(990, 0, -90)]


def freed(family: Family | str = "dit", **changes: Any) -> DynamicTransformer:
    model = tiny_model(family, **changes).requires_grad_(False).set_execution("compact")
    return model.pack(free=True)


@torch.no_grad()
def run(model: DynamicTransformer, t: float = 640.0) -> Tensor:
    images, _, labels = tiny_inputs(model)
    return model(images, t, labels).sample


def held_bytes(model: DynamicTransformer) -> int:
    """Of all parameters that have memory, and of everything packed."""
    stored = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    return stored + model._executor.packed_bytes


ATTENTION = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight")
MLP = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight")

SHAPES = {
    "usual": {},
    "fewer groups": {"num_groups": 4},
    "one head": {"num_attention_heads": 1, "num_groups": 6},
}


@each_backbone
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_back_bit_for_bit(family: Family, shape: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, **SHAPES[shape]).to(dtype).requires_grad_(False).set_execution("compact")
    with torch.no_grad():
        # No value is equal to these; their bits are all the same kept.
        model.blocks[0].attn.qkv.weight[0, :2] = torch.tensor([float("nan"), -0.0])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert model.pack(free=True).is_freed
    assert not model.unpack().is_freed
    after = model.state_dict()
    assert list(after) == list(before)
    for key, tensor in after.items():
        assert same_bits(tensor, before[key]), key
        assert tensor.is_contiguous()


@each_backbone
def test_results_are_the_same(family: Family) -> None:
    model = tiny_model(family).requires_grad_(False).set_execution("compact")
    expected = run(model)
    assert torch.equal(bits(run(model.pack(free=True))), bits(expected))
    assert torch.equal(bits(run(model.pack(free=True))), bits(expected))
    assert torch.equal(bits(run(model.unpack())), bits(expected))


def test_weights_are_held_once() -> None:
    model = tiny_model().requires_grad_(False).set_execution("compact")
    alone = held_bytes(model)
    both = held_bytes(model.pack())
    sliceable = both - alone
    assert sliceable > alone / 4
    assert held_bytes(model.pack(free=True)) == alone
    names = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert names == {f"blocks.{block}.{name}" for block in range(3) for name in (*ATTENTION, *MLP)}
    # Shapes and types can still be asked for.
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny_model().parameters())
    assert model.unpack()._executor.packed_bytes == 0


@pytest.mark.parametrize("budget", [0.0, 0.3, 10.0])
def test_plans_keep_to_the_budget_and_lose_nothing(budget: float) -> None:
    """A plan lays slabs out anew: the layer's own slabs follow, and go back to their places at the end."""
    model = tiny_model().requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = {t: run(tiny_model().set_execution("compact"), t) for t in TIMES}
    model._executor = CompactExecutor(slice_budget=budget)
    alone = held_bytes(model)
    slabs = model.pack(free=True)._executor.packed_bytes
    for times in (TIMES, TIMES[::3], TIMES[1:2]):
        plan = model.plan(times)
        assert plan.policies["swap"] == 0
        for t in times:
            assert relative_difference(run(model, t), expected[t]) < 1e-5
            assert held_bytes(model) <= alone + max(budget, 1 / 6) * slabs
    for key, tensor in model.unpack().state_dict().items():
        assert same_bits(tensor, before[key]), key


def test_twins_share_what_is_left() -> None:
    model = freed()
    expected = run(model)
    twin = copy.copy(model).set_execution("compact", token_capacity=1.0)
    twin.plan(TIMES)
    model.plan(TIMES[:1])
    for each in (twin, model):
        assert relative_difference(run(each), expected) < 1e-5
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.is_freed
        assert relative_difference(run(other), expected) < 1e-5
        other.unpack()
    assert model.is_freed


# ------------------------------------------------------------------ what needs the stored weights


def dense(model: DynamicTransformer) -> None:
    model.denoise(*tiny_inputs(model), executor=DenseExecutor())


def static(model: DynamicTransformer) -> None:
    model.denoise(*tiny_inputs(model), executor=StaticExecutor())


REFUSED: dict[str, Callable[[DynamicTransformer], object]] = {
    "state dict": lambda model: model.state_dict(),
    "loading": lambda model: model.load_state_dict({}),
    "saving": lambda model: model.save_pretrained("folder"),
    "set dense": lambda model: model.set_execution("dense"),
    "set static": lambda model: model.set_execution("static"),
    "run dense": dense,
    "run static": static,
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_needs_them_says_how_to_get_them_back(name: str) -> None:
    model = freed()
    with pytest.raises(DyditError) as caught:
        REFUSED[name](model)
    assert "unpack()" in caught.value.fix
    assert not Path("folder").exists()
    assert torch.isfinite(run(model)).all()


def test_a_model_can_be_saved_afterwards(tmp_path: Path) -> None:
    model = freed()
    expected = run(model)
    model.unpack().save_pretrained(tmp_path / "m")
    loaded = dydit_cli.load_model(tmp_path / "m").pack(free=True)
    assert torch.equal(bits(run(loaded)), bits(expected))


def test_only_compact_execution_packs() -> None:
    model = tiny_model().requires_grad_(False)
    with pytest.raises(DyditError, match="for compact execution, not for 'dense'"):
        model.pack()


def test_what_is_being_trained_is_not_freed() -> None:
    model = tiny_model().set_execution("compact")
    model.blocks[2].mlp.fc2.requires_grad_(True)
    with pytest.raises(DyditError, match="being trained"):
        model.pack(free=True)
    # Nothing is left half done.
    assert not model.is_freed
    assert model.state_dict()


def test_a_layer_of_another_kind_is_not_freed() -> None:
    with pytest.raises(TypeError):
        free_weights([torch.nn.Linear(2, 2)])


# ------------------------------------------------------------------ changes


def test_casting_and_moving_go_on() -> None:
    model = freed()
    model.to(torch.bfloat16)
    assert model.is_freed
    plain = tiny_model().to(torch.bfloat16).requires_grad_(False).set_execution("compact")
    assert torch.equal(bits(run(model)), bits(run(plain)))
    assert model.to("cpu").is_freed
    for key, tensor in model.unpack().state_dict().items():
        assert same_bits(tensor, plain.state_dict()[key]), key


def test_routing_is_told() -> None:
    model = freed()
    images, times, labels = tiny_inputs(model)
    expected = tiny_model().routing(times, images, labels)
    assert torch.equal(model.routing(times, images, labels).tokens, expected.tokens)
    assert torch.equal(model.routing(times).heads, expected.heads)


@torch.no_grad()
def test_what_stays_may_change() -> None:
    model, other = freed(), tiny_model().requires_grad_(False).set_execution("compact")
    run(model)
    for each in (model, other):
        each.blocks[0].attn.proj.bias += 1
        each.blocks[1].mlp.fc2.bias = torch.nn.Parameter(each.blocks[1].mlp.fc2.bias * 2, requires_grad=False)
        each.blocks[2].head_router.linear.bias.neg_()
    assert torch.equal(bits(run(model)), bits(run(other)))


def replace_layer(model: DynamicTransformer) -> None:
    model.blocks[0].mlp.fc1 = torch.nn.Linear(48, 192).requires_grad_(False)


def edit_order(model: DynamicTransformer) -> None:
    model.blocks[1].attn.head_order.copy_(model.blocks[1].attn.head_order.flip(0))


def attach_adapter(model: DynamicTransformer) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    # An adapter that adds nothing would change no bit.
    inject_adapter_in_model(LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False), model)


@pytest.mark.parametrize("change", [replace_layer, edit_order, attach_adapter])
@torch.no_grad()
def test_changes_that_packed_weights_cannot_follow_are_refused(
    change: Callable[[DynamicTransformer], None],
) -> None:
    model = freed()
    run(model)
    change(model)
    with pytest.raises(DyditError) as caught:
        run(model)
    assert "unpack()" in caught.value.fix


def test_an_adapted_model_is_not_freed() -> None:
    model = tiny_model().requires_grad_(False).set_execution("compact")
    attach_adapter(model)
    model.requires_grad_(False)
    with pytest.raises(DyditError, match="adapter"):
        model.pack(free=True)
    assert not model.is_freed
