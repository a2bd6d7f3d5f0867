"""Frozen weights in fewer bits below adapters."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from dydit_cli.adapters.attaching import AdapterKind, AdapterSettings, adapted_layers, attach
from dydit_cli.adapters.bases import BaseKind, StoredLinear, compress_base, compressed, restored
from dydit_cli.adapters.plain import without_wrappers
from dydit_cli.artifacts import load_model
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import prepare
from tests.tiny import relative_difference, tiny_inputs, tiny_model
from tests.training.runs import settings_for

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
INT8, NF4 = (pytest.param(kind, marks=needs_bitsandbytes) for kind in ("int8", "nf4"))
each_kind = pytest.mark.parametrize("kind", ["bf16", INT8, NF4])


def weights(rows: int = 24, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def through_storage(weight: torch.Tensor, kind: BaseKind) -> torch.Tensor:
    return restored(*compressed(weight, kind), kind, tuple(weight.shape))


@each_kind
def test_a_weight_takes_as_many_bits(kind: BaseKind) -> None:
    weight, bits = weights(256, 256), {"bf16": 16, "int8": 8, "nf4": 4}[kind]
    stored, scales = compressed(weight, kind)
    assert stored.numel() * stored.element_size() * 8 == bits * weight.numel()
    assert scales.numel() <= weight.numel() / 64


@needs_bitsandbytes
def test_int8_errs_by_half_a_step_of_its_row() -> None:
    weight = weights() * torch.logspace(-2, 2, 24)[:, None]
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    # Half of a step, and the rounding to fp16 that bitsandbytes does first.
    assert ((through_storage(weight, "int8") - weight).abs() <= 0.6 * steps).all()


@needs_bitsandbytes
def test_nf4_keeps_the_largest_of_each_block_and_is_near_elsewhere() -> None:
    blocks = weights(8, 64)
    found = through_storage(blocks, "nf4")
    largest = blocks.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(found.gather(1, largest), blocks.gather(1, largest))
    # The widest gap between two of the sixteen values is 0.304 of the largest magnitude.
    assert ((found - blocks).abs() <= 0.153 * blocks.abs().amax(dim=1, keepdim=True)).all()
    assert len(found[0].unique()) <= 16


def test_fewer_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = attach(tiny_model("dit"), AdapterSettings("lora", rank=2))
    with pytest.raises(DyditError, match="stored as nf4") as error:
        compress_base(model, "nf4")
    assert "pip install bitsandbytes" in error.value.fix


@each_kind
def test_what_is_stored_once_is_stored_the_same_again(kind: BaseKind) -> None:
    once = through_storage(weights(), kind)
    # int8 goes through fp16.
    torch.testing.assert_close(through_storage(once, kind), once, rtol=1e-3, atol=1e-3)
    assert not through_storage(torch.zeros(4, 64), kind).any()


@each_kind
def test_gradients_of_inputs_are_those_of_the_restored_weight(kind: BaseKind) -> None:
    layer = nn.Linear(40, 24)
    stored = StoredLinear(layer, kind)
    one, other = (weights(7, 40).requires_grad_() for _ in range(2))
    expected = nn.functional.linear(one, stored.restored_weight(), layer.bias)
    found = stored(other)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(other.grad, one.grad)


@each_kind
@pytest.mark.parametrize("adapter", ["lora", "td-lora"])
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_compact_equals_dense_and_the_plain_model(family: str, adapter: AdapterKind, kind: BaseKind) -> None:
    model = attach(tiny_model(family), AdapterSettings(adapter, rank=2))
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    compress_base(model, kind)
    arguments = tiny_inputs(model, 3)
    with torch.no_grad():
        dense, _ = model.denoise(*arguments, executor=DenseExecutor())
        compact, _ = model.denoise(*arguments, executor=CompactExecutor())
        plain, _ = without_wrappers(model).denoise(*arguments, executor=DenseExecutor())
    assert relative_difference(compact, dense) < 1e-5
    assert relative_difference(plain, dense) < 1e-5


@needs_bitsandbytes
def test_a_run_on_four_bits(tmp_path: Path) -> None:
    """What is saved is what was trained: the restored weights with the adapters."""
    started = prepare(settings_for(tmp_path, method="td-lora", base="nf4", learning_rate=1e-2))
    for _ in started.steps(should_stop=lambda: started.done == 3):
        pass
    again = prepare(settings_for(tmp_path, method="td-lora", base="nf4", learning_rate=1e-2, resume=True))
    for _ in again.steps():
        pass
    again.finish()
    layers = [layer.base_layer for _, layer in adapted_layers(again.model)]
    followed = [layer.base_layer for _, layer in adapted_layers(again.average.model)]
    assert all(one.stored is other.stored for one, other in zip(layers, followed, strict=True))
    model = load_model(tmp_path / "t")
    arguments = tiny_inputs(model, 3)
    with torch.no_grad():
        expected, _ = again.average.model.denoise(*arguments, executor=DenseExecutor())
        found, _ = model.denoise(*arguments)
    assert relative_difference(found, expected) < 1e-5


def test_weights_that_train_are_stored_whole() -> None:
    with pytest.raises(ValueError, match="frozen weights below adapters"):
        FinetuneSection(model="m", data="d", out="o", steps=1, base="int8")
