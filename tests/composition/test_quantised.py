"""int8 weights of torchao: every execution computes with the same numbers, and compact execution keeps them in int8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor, nn

from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor
from dydit_cli.execution.quantised import is_quantised, parts_of_tensor, plain
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from tests.execution.test_pipelines import draw, pipeline_of
from tests.families.flux_pipelines import flux_pipeline, sampled
from tests.tiny import bits, each_family, predict, relative_difference, tiny_inputs, tiny_model

torchao = pytest.importorskip("torchao.quantization")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def outside_routers(module: nn.Module, name: str) -> bool:
    """As the documentation has it."""
    return isinstance(module, nn.Linear) and "_router" not in name


def quantised(model: DynamicModel, config: Any = None, everything: bool = False) -> DynamicModel:
    """The model with int8 weights in its linear layers."""
    torchao.quantize_(
        model, config or torchao.Int8WeightOnlyConfig(), None if everything else outside_routers
    )
    return model


def predictions(model: DynamicModel, execution: str) -> Tensor:
    """At three timesteps in one batch, and at one."""
    model.set_execution(execution)
    sample, times, condition = tiny_inputs(model, 3)
    mixed = predict(model, sample, times, condition)
    alike = predict(model, sample, times[:1].expand(3), condition)
    return torch.cat([mixed, alike])


@each_family
@pytest.mark.parametrize("everything", [False, True], ids=["backbone", "routers too"])
def test_compact_and_dense_execution_agree(family: Family, everything: bool) -> None:
    model = quantised(tiny_model(family), everything=everything)
    dense = predictions(model, "dense")
    assert relative_difference(predictions(model, "compact"), dense) < 1e-5
    assert relative_difference(predictions(model, "static"), dense) > 1e-3


@each_family
def test_the_rounding_of_weights_is_all_that_changes(family: Family) -> None:
    """A number is rounded to 1/127 of its row's largest, at most by half of that; the model is that of the rounded numbers."""
    exact, model = tiny_model(family), quantised(tiny_model(family))
    rounded = tiny_model(family)
    weights = dict(model.named_parameters())
    for name, weight in rounded.named_parameters():
        if not is_quantised(weights[name]):
            assert torch.equal(weight, weights[name])
            continue
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((plain(weights[name]) - weight).abs() <= 0.51 * step).all()
        weight.copy_(plain(weights[name]))
    found = predictions(model, "static")
    assert relative_difference(found, predictions(rounded, "static")) < 1e-5
    # With everything on. Where a decision falls the other way, random weights answer with another prediction.
    expected = predictions(exact, "static")
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < float(error) < 0.1


@each_family
def test_packed_weights_are_int8(family: Family) -> None:
    held = {}
    for name, each in (("fp32", tiny_model(family)), ("int8", quantised(tiny_model(family)))):
        each.set_execution("compact").pack()
        executor = each._executor
        assert isinstance(executor, CompactExecutor)
        held[name] = executor.packed_bytes
    # A byte a weight, and four for each bias and for each scale of a row.
    assert 0.25 * held["fp32"] < held["int8"] < 0.32 * held["fp32"]


@each_family
def test_weights_are_held_once(family: Family) -> None:
    model = quantised(tiny_model(family)).requires_grad_(False).set_execution("compact")
    expected = predictions(model, "compact")
    stored = {name: tensor for name, tensor in numbers(model).items() if not tensor.is_meta}
    model.pack(free=True)
    left = {name for name, tensor in numbers(model).items() if not tensor.is_meta}
    freed = sum(tensor.nbytes for name, tensor in stored.items() if name not in left)
    executor = model._executor
    assert isinstance(executor, CompactExecutor)
    # What is packed and not given back are scales.
    assert 0.7 * executor.packed_bytes < freed < executor.packed_bytes
    assert torch.equal(bits(predictions(model, "compact")), bits(expected))
    model.unpack()
    for name, tensor in numbers(model).items():
        assert torch.equal(bits(tensor), bits(stored[name])), name
    assert relative_difference(predictions(model, "dense"), expected) < 1e-5


def numbers(model: DynamicModel) -> dict[str, Tensor]:
    """Every tensor that the model stores, those that torchao keeps in the place of weights by themselves."""
    return {
        f"{name}.{place}": part
        for name, tensor in model.named_parameters()
        for place, part in enumerate(parts_of_tensor(tensor))
    }


def test_quantising_a_running_model_packs_again() -> None:
    model = tiny_model("dit")
    before = predictions(model, "compact")
    quantised(model)
    after = predictions(model, "compact")
    assert not torch.equal(after, before)
    assert relative_difference(after, predictions(model, "dense")) < 1e-5


def test_plans_slice_int8_as_they_do_floats() -> None:
    """A budget of slices in which copies do not fit: slabs are swapped, scales with them."""
    model = quantised(tiny_model("dit")).set_execution("compact")
    model._executor = CompactExecutor(slice_budget=0.1)
    times = [900.0, 650.0, 400.0, 150.0]
    plan = model.plan(times, [1, 2, 3])
    assert plan.policies["swap"] + plan.policies["gather"] > 0
    sample, _, labels = tiny_inputs(model, 3)
    compact = [predict(model, sample, torch.full((3,), t), labels) for t in times * 2]
    model.set_execution("dense")
    for found, t in zip(compact, times * 2, strict=True):
        assert relative_difference(found, predict(model, sample, torch.full((3,), t), labels)) < 1e-5


def test_bfloat16() -> None:
    """Weights that were loaded in bf16 are rounded to int8 from there, and their scales are bf16."""
    model = quantised(tiny_model("dit").to(torch.bfloat16))
    assert relative_difference(predictions(model, "compact"), predictions(model, "dense")) < 0.05


def test_weights_that_follow_the_timestep() -> None:
    model = tiny_model("dit", td_lora={"rank": 2, "experts": 3})
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), outside_routers)
    assert relative_difference(predictions(model, "compact"), predictions(model, "dense")) < 1e-5


def test_static_shapes() -> None:
    model = quantised(tiny_model("dit"))
    dense = predictions(model, "dense")
    model.set_execution("compact", token_capacity=1.0)
    sample, times, condition = tiny_inputs(model, 3)
    assert relative_difference(predict(model, sample, times, condition), dense[:3]) < 1e-5


class TestLoading:
    def test_diffusers_quantises_while_it_loads(self, tmp_path: Path) -> None:
        from diffusers import TorchAoConfig

        saved = tiny_model("dit")
        saved.save_pretrained(tmp_path)
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=["_router"])
        loaded = type(saved).from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float32)
        assert type(loaded.blocks[0].mlp.fc1.weight).__name__ == "Int8Tensor"
        assert type(loaded.blocks[0].head_router.linear.weight) is nn.Parameter
        expected = predictions(quantised(saved), "compact")
        assert relative_difference(predictions(loaded, "compact"), expected) < 1e-5

    def test_stock_pipelines(self) -> None:
        model = tiny_model("dit", learn_sigma=False).set_execution("compact")
        before = draw(pipeline_of(model))
        quantised(model)
        compact = draw(pipeline_of(model))
        assert relative_difference(compact, before) > 0
        assert relative_difference(draw(pipeline_of(model.set_execution("dense"))), compact) < 1e-4
        flux = quantised(tiny_model("flux")).set_execution("compact")
        assert torch.isfinite(sampled(flux_pipeline(flux))).all()


class TestTogether:
    def test_with_a_step_cache(self) -> None:
        model = quantised(tiny_model("dit"))
        model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        found = {}
        for execution in ("dense", "compact"):
            model.begin_run()
            found[execution] = predictions(model, execution)
        assert relative_difference(found["compact"], found["dense"]) < 1e-5

    @pytest.mark.parametrize("execution", ["compact", "static"])
    def test_with_compiled_blocks(self, execution: str) -> None:
        """Traced and run as Python, so that no compiler is waited for."""
        from dydit_cli.execution import CompiledCompactExecutor, CompiledStaticExecutor

        model = quantised(tiny_model("dit"))
        expected = predictions(model, execution)
        kind = CompiledCompactExecutor if execution == "compact" else CompiledStaticExecutor
        model._executor = kind(backend="eager")
        model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        sample, times, condition = tiny_inputs(model, 3)
        alike = predict(model, sample, times[:1].expand(3), condition)
        assert relative_difference(alike, expected[3:]) < 1e-5


class TestRefusals:
    @pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"])
    def test_other_forms(self, name: str) -> None:
        model = quantised(tiny_model("dit"), getattr(torchao, name)())
        with pytest.raises(DyditError, match="int8 with a scale for each row"):
            predictions(model, "compact")
        assert torch.isfinite(predictions(model, "static")).all()

    def test_freeing_other_forms(self) -> None:
        model = quantised(tiny_model("dit"), torchao.Float8WeightOnlyConfig()).set_execution("compact")
        with pytest.raises(DyditError, match="int8 with a scale for each row"):
            model.requires_grad_(False).pack(free=True)
        assert torch.isfinite(predictions(model, "dense")).all()
