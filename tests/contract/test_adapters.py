"""LoRA and TD-LoRA in every family: compact equals dense whether adapters are attached, merged, or mixed at each step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dydit_cli.adapters.attaching import ADAPTER, AdapterKind, AdapterSettings, adapted_layers, attach
from dydit_cli.adapters.plain import without_wrappers
from dydit_cli.dynamic.gates import CompleteGating, GumbelGating, ImposedGating, RoutingNoise, ThresholdGating
from dydit_cli.dynamic.timed import TimedLinear
from dydit_cli.execution import CompactExecutor, CompiledCompactExecutor, DenseExecutor, StaticExecutor
from dydit_cli.execution.capacity import CapacityExecutor
from dydit_cli.execution.graphs import only_own_layers
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from tests.tiny import (
    LABELLED,
    bits,
    each_family,
    each_labelled_family,
    predict,
    random_routing,
    relative_difference,
    tiny_inputs,
    tiny_model,
)

BATCH = 4
KINDS: tuple[AdapterKind, ...] = ("lora", "td-lora")
each_kind = pytest.mark.parametrize("kind", KINDS)


def filled(model: DynamicModel) -> DynamicModel:
    """Every number of the adapters non-zero, the gates decisive."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(family: Family, kind: AdapterKind = "td-lora") -> DynamicModel:
    return filled(attach(tiny_model(family), AdapterSettings(kind, rank=3, alpha=6, experts=4)))


def timed(family: Family) -> DynamicModel:
    """A model with experts of its own, as `load_model` gives it."""
    return without_wrappers(adapted(family)).requires_grad_(False)


@torch.no_grad()
def dense(model: DynamicModel, *arguments: object) -> Tensor:
    return model.denoise(*arguments, executor=DenseExecutor())[0]  # type: ignore[arg-type]


@each_family
@each_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attached(family: Family, kind: AdapterKind, dtype: torch.dtype, tolerance: float) -> None:
    """A batch of mixed timesteps and masks, in which each sample has weights of its own."""
    model = adapted(family, kind).to(dtype)
    arguments = tiny_inputs(model, BATCH)
    gating = ImposedGating(random_routing(model.geometry, BATCH))
    with torch.no_grad():
        first, _ = model.denoise(*arguments, executor=DenseExecutor(), gating=gating)
        second, _ = model.denoise(*arguments, executor=CompactExecutor(), gating=gating)
        third, _ = tiny_model(family).to(dtype).denoise(*arguments, executor=DenseExecutor(), gating=gating)
    assert relative_difference(second, first) < tolerance
    assert relative_difference(third, first) > 0.05


@each_family
def test_lora_merged(family: Family) -> None:
    model = adapted(family, "lora")
    merged, arguments = without_wrappers(model), tiny_inputs(model, BATCH)
    assert not any(".lora_" in name for name in merged.state_dict())
    assert relative_difference(dense(merged, *arguments), dense(model, *arguments)) < 1e-5
    expected = dense(merged, *arguments)
    assert relative_difference(predict(merged.set_execution("compact"), *arguments), expected) < 1e-5


@each_family
def test_td_lora_as_the_model_s_own_layers(family: Family) -> None:
    """Bit for bit what peft's layers compute, and the frozen weights are held once."""
    model = adapted(family)
    plain, arguments = without_wrappers(model), tiny_inputs(model, BATCH)
    assert torch.equal(bits(dense(plain, *arguments)), bits(dense(model, *arguments)))
    base = next(layer for _, layer in adapted_layers(model)).base_layer
    own = next(layer for layer in plain.modules() if isinstance(layer, TimedLinear))
    assert own.weight is base.weight


@each_family
@pytest.mark.parametrize("budget", [1.0, 0.0], ids=["cached or prefix", "swapped or gathered"])
def test_mixed_at_each_step_of_a_plan(family: Family, budget: float) -> None:
    """Whatever keeps the slices, the factors of low rank follow their units; steps may come in any order, and again."""
    model = timed(family)
    samples, times, conditions = tiny_inputs(model, 6)
    executor = CompactExecutor(slice_budget=budget)
    plan = executor.make_plan(model, times, [], ThresholdGating())
    assert budget or not {"cache"} & set(plan.policies)
    for row in (0, 1, 2, 3, 4, 5, 3, 0, 5):
        one = (samples[:2], times[row].expand(2), conditions[:2])
        with torch.no_grad():
            found, _ = model.denoise(*one, executor=executor)
        assert relative_difference(found, dense(model, *one)) < 1e-5
    assert plan.hits == 9
    with torch.no_grad():
        found, _ = model.denoise(samples, times, conditions, executor=executor)
    assert relative_difference(found, dense(model, samples, times, conditions)) < 1e-5


@each_family
def test_merging_leaves_nothing_behind(family: Family) -> None:
    """Merged afresh from the stored weights: a step gives the same bits after a hundred others, and no weight has moved."""
    model = timed(family).set_execution("compact")
    samples, times, conditions = tiny_inputs(model, BATCH)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first = predict(model, samples[:1], times[0], conditions[:1])
        for row in range(1, BATCH):
            predict(model, samples[:1], times[row], conditions[:1])
        again = predict(model, samples[:1], times[0], conditions[:1])
    assert torch.equal(bits(again), bits(first))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


@each_family
def test_static_execution_is_dense_with_everything_on(family: Family) -> None:
    model = timed(family)
    arguments = tiny_inputs(model, BATCH)
    with torch.no_grad():
        static, _ = model.denoise(*arguments, executor=StaticExecutor(), gating=CompleteGating())
        complete, _ = model.denoise(*arguments, executor=DenseExecutor(), gating=CompleteGating())
    assert relative_difference(static, complete) < 1e-6


@each_family
def test_a_changed_expert_or_gate_is_noticed(family: Family) -> None:
    model = timed(family).set_execution("compact")
    arguments = tiny_inputs(model, 2)
    layer = next(layer for layer in model.modules() if isinstance(layer, TimedLinear))
    for part in (layer.timed_experts, layer.timed_first, layer.timed_gate.weight):
        before = predict(model, *arguments)
        with torch.no_grad():
            part[0].add_(0.5)
        after = predict(model, *arguments)
        assert relative_difference(after, before) > 1e-4
        assert relative_difference(after, dense(model, *arguments)) < 1e-5


@each_family
def test_switched_off_it_is_the_base_model(family: Family) -> None:
    model, arguments = adapted(family), tiny_inputs(tiny_model(family), 2)
    before = predict(model.requires_grad_(False).set_execution("compact"), *arguments)
    for _, layer in adapted_layers(model):
        layer.enable_adapters(False)
    off = predict(model, *arguments)
    assert relative_difference(off, dense(tiny_model(family), *arguments)) < 1e-5
    assert relative_difference(before, off) > 0.05


@each_family
def test_gradient_checkpointing_changes_no_bit(family: Family) -> None:
    """The timestep embedding is an argument of a block, so that a replayed block mixes the same experts."""
    model = adapted(family).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        noise = RoutingNoise.draw(model.geometry, seed=0, step=0, indices=range(BATCH))
        output, _ = model.denoise(
            *tiny_inputs(model, BATCH), executor=DenseExecutor(), gating=GumbelGating(noise)
        )
        output.square().mean().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    expected = gradients()
    model.enable_gradient_checkpointing()
    actual = gradients()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(actual) == set(expected) == trained
    assert {name for name in trained if ".lora_gate." in name}
    for name, gradient in actual.items():
        assert gradient.any(), name
        assert torch.equal(bits(gradient), bits(expected[name])), name


@each_labelled_family
def test_room_for_tokens(family: Family) -> None:
    model = timed(family)
    arguments = tiny_inputs(model, BATCH)
    for share in (1.0, 0.6):
        executor = CapacityExecutor(share)
        with torch.no_grad():
            found, _ = model.denoise(*arguments, executor=executor)
        assert relative_difference(found, dense(model, *arguments)) < 1e-5


def test_compiled_blocks_run_eagerly_where_samples_have_weights_of_their_own() -> None:
    model = timed(LABELLED[0])
    samples, times, labels = tiny_inputs(model, BATCH)
    executor = CompiledCompactExecutor(backend="eager")
    for when in (times[0].expand(BATCH), times):
        with torch.no_grad():
            found, _ = model.denoise(samples, when, labels, executor=executor)
        assert relative_difference(found, dense(model, samples, when, labels)) < 1e-5


def test_steps_are_not_recorded() -> None:
    """A recording serves all timesteps that have its masks."""
    assert only_own_layers(tiny_model("dit"))
    assert not only_own_layers(timed(LABELLED[0]))
    assert not only_own_layers(adapted(LABELLED[0]))


@each_family
def test_a_model_without_experts_carries_the_embedding_and_nothing_else(family: Family) -> None:
    """The time of a width changes nothing there."""
    model = tiny_model(family)
    arguments = tiny_inputs(model, 2)
    executor = DenseExecutor()
    expected = dense(model, *arguments)
    asked = executor.widths

    def without_time(*given: object):  # type: ignore[no-untyped-def]
        return [replace(width, time=None) for width in asked(*given)]  # type: ignore[arg-type]

    executor.widths = without_time  # type: ignore[method-assign]
    with torch.no_grad():
        assert torch.equal(model.denoise(*arguments, executor=executor)[0], expected)
    assert ADAPTER not in str(model.state_dict().keys())


@each_family
def test_weights_given_back_while_experts_change(family: Family) -> None:
    """The stored weights are freed, the factors of low rank are not."""
    model = timed(family).set_execution("compact")
    arguments = tiny_inputs(model, 2)
    model.pack(free=True)
    layer = next(layer for layer in model.modules() if isinstance(layer, TimedLinear))
    before = predict(model, *arguments)
    with torch.no_grad():
        layer.timed_experts[0].add_(0.5)
    after = predict(model, *arguments)
    assert relative_difference(after, before) > 1e-4
    assert relative_difference(after, dense(model.unpack(), *arguments)) < 1e-5
