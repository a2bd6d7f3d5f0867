"""The one contract test of what peft marks experimental, and TD-LoRA's arithmetic and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dydit_cli.adapters.attaching import (
    ADAPTER,
    AdapterKind,
    AdapterSettings,
    adapted_layers,
    attach,
    trainable_share,
)
from dydit_cli.adapters.storing import load_adapters, read_settings, save_adapters
from dydit_cli.adapters.td_lora import TDLoraLinear
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import preset_named
from dydit_cli.families.timed_layers import adaptable_layers
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import FinetuneSection
from tests.tiny import tiny_model

LAYER = "blocks.1.attn.qkv"
TD_LORA = AdapterSettings("td-lora", rank=3, alpha=6, experts=4)
KINDS: tuple[AdapterKind, ...] = ("lora", "td-lora")


def filled(model: DynamicModel, seed: int = 3) -> DynamicModel:
    """Every number of the adapters non-zero, the gates decisive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def embeddings(model: DynamicModel, batch: int = 3) -> Tensor:
    return 3 * torch.randn(batch, model.geometry.hidden_size, generator=torch.Generator().manual_seed(5))


def inputs_of(model: DynamicModel, batch: int = 3) -> Tensor:
    return torch.randn(batch, 7, model.geometry.hidden_size, generator=torch.Generator().manual_seed(6))


def layer_of(model: nn.Module, name: str = LAYER) -> TDLoraLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, TDLoraLinear)
    return layer


def test_a_fresh_adapter_changes_nothing() -> None:
    plain, model = tiny_model("dit"), attach(tiny_model("dit"), TD_LORA)
    inputs = inputs_of(model)
    expected = plain.get_submodule(LAYER)(inputs)
    assert torch.equal(layer_of(model)(inputs, embeddings(model)), expected)


def test_forward_is_the_mixture_of_experts() -> None:
    model = filled(attach(tiny_model("dit"), TD_LORA))
    layer, inputs, times = layer_of(model), inputs_of(model), embeddings(model)
    first = layer.lora_A[ADAPTER].weight
    weights = layer.factor(ADAPTER).mixture(times)
    assert weights.shape == (3, 4)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    expected = layer.base_layer(inputs)
    for sample in range(3):
        for number, second in enumerate(layer.experts(ADAPTER)):
            expected[sample] += 2.0 * weights[sample, number] * (inputs[sample] @ first.T @ second.T)
    torch.testing.assert_close(layer(inputs, times), expected, rtol=1e-4, atol=1e-4)
    delta = layer.factor(ADAPTER).mixed(times[:1])[0] @ first
    one = inputs[:1] @ (layer.base_layer.weight + delta).T + layer.base_layer.bias
    torch.testing.assert_close(layer(inputs, times)[:1], one, rtol=1e-4, atol=1e-4)


def test_gradients_reach_factors_and_gate() -> None:
    model = filled(attach(tiny_model("dit"), TD_LORA))
    layer = layer_of(model)
    layer(inputs_of(model), embeddings(model)).square().sum().backward()
    for parameter in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().min() > 0
    gate = layer.lora_gate[ADAPTER]
    assert isinstance(gate, nn.Linear)
    assert gate.weight.grad is not None
    assert float(gate.weight.grad.abs().max()) > 0
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_routers_train(kind: AdapterKind) -> None:
    model = attach(tiny_model("dit"), AdapterSettings(kind))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains
    assert all(".lora_" in name or "_router." in name for name in trains)
    assert {name for name, _ in model.named_parameters() if "_router." in name} <= trains
    assert len(list(adapted_layers(model))) == 4 * model.geometry.depth
    assert 0 < trainable_share(model) < 1


def test_the_recipe_of_the_published_size_trains_few_parameters() -> None:
    section = load_recipe("dit-xl-2-256/td-lora", (), "finetune").get(FinetuneSection)
    assert section is not None
    assert section.method == "td-lora"
    family, config = preset_named("dit-xl/2")
    with torch.device("meta"):
        settings = AdapterSettings("td-lora", section.lora_rank, section.lora_alpha, section.lora_experts)
        model = attach(family.model_class(**config), settings)
    assert trainable_share(model) == pytest.approx(0.01386, abs=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_files_give_the_same_model_back(kind: AdapterKind, tmp_path: Path) -> None:
    settings = AdapterSettings(kind, rank=3, alpha=6, experts=4)
    model = filled(attach(tiny_model("dit"), settings))
    save_adapters(model, tmp_path, settings)
    again = tiny_model("dit", seed=0)
    with torch.no_grad():
        for parameter in again.router_parameters():
            parameter.zero_()
    assert load_adapters(again, tmp_path) == AdapterSettings(kind, 3, 6.0, 4 if kind == "td-lora" else 1)
    expected = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_experts_are_ordinary_peft_folders(tmp_path: Path) -> None:
    """N LoRAs in stock peft, scaled by a_i(t), are the TD-LoRA at t."""
    model = filled(attach(tiny_model("dit"), TD_LORA))
    save_adapters(model, tmp_path, TD_LORA)
    stock = PeftModel.from_pretrained(tiny_model("dit"), str(tmp_path / "expert_0"), adapter_name="expert_0")
    for number in range(1, 4):
        stock.load_adapter(str(tmp_path / f"expert_{number}"), adapter_name=f"expert_{number}")
    stock.base_model.set_adapter([f"expert_{number}" for number in range(4)])
    time, inputs = embeddings(model, 1), inputs_of(model, 1)
    for name in adaptable_layers(tiny_model("dit"))[:2]:
        ours, theirs = layer_of(model, name), stock.base_model.model.get_submodule(name)
        for number, weight in enumerate(ours.factor(ADAPTER).mixture(time)[0].tolist()):
            theirs.set_scale(f"expert_{number}", weight)
        difference = (theirs(inputs) - ours(inputs, time)).abs().max()
        assert float(difference) <= 4e-6 * float(theirs(inputs).abs().max())


def test_merging_once_is_refused() -> None:
    layer = layer_of(attach(tiny_model("dit"), TD_LORA))
    with pytest.raises(DyditError, match="cannot be merged"):
        layer.merge()


def test_a_second_adapter_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="already"):
        attach(attach(tiny_model("dit"), TD_LORA), TD_LORA)
    with pytest.raises(DyditError, match="no adapters"):
        read_settings(tmp_path)
    save_adapters(filled(attach(tiny_model("dit"), TD_LORA)), tmp_path, TD_LORA)
    with pytest.raises(DyditError, match="do not fit"):
        load_adapters(tiny_model("dit", hidden_size=96), tmp_path)
