"""LoRA files made for the static model, in a stock pipeline, fused and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from dydit_cli.dynamic.gates import ImposedGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import DenseExecutor
from dydit_cli.families.flux import DyFluxTransformer2DModel
from tests.families.flux_pipelines import flux_pipeline, lora_file, sampled
from tests.families.test_flux import forward_inputs, static_twin
from tests.tiny import random_routing, relative_difference, tiny_inputs, tiny_model


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def with_lora(pipeline: FluxPipeline, seed: int = 0, name: str = "style") -> FluxPipeline:
    pipeline.load_lora_weights(lora_file(seed), adapter_name=name)
    return pipeline


@pytest.mark.parametrize("execution", ["dense", "compact", "static"])
@pytest.mark.parametrize("fused", [False, True], ids=["attached", "fused"])
def test_a_static_model_s_lora_gives_the_same_on_the_complete_one(execution: str, fused: bool) -> None:
    model = tiny_model("flux").set_keep_bias(float("inf"))
    twin = flux_pipeline(static_twin(model))
    lora = lora_file()
    plain = sampled(twin)
    twin.load_lora_weights(lora)
    expected = sampled(twin)
    assert relative_difference(plain, expected) > 0.05
    pipeline = flux_pipeline(model.set_execution(execution))
    pipeline.load_lora_weights(lora)
    if fused:
        pipeline.fuse_lora()
    assert relative_difference(sampled(pipeline), expected) < 1e-5
    weaker = {"joint_attention_kwargs": {"scale": 0.7}}
    if not fused:
        assert relative_difference(sampled(pipeline, **weaker), sampled(twin, **weaker)) < 1e-5
        assert relative_difference(sampled(pipeline, **weaker), expected) > 0.01


def both(model: DyFluxTransformer2DModel) -> tuple[Tensor, Tensor]:
    """What dense and the model's own compact execution give for the same masks."""
    arguments, gating = tiny_inputs(model, 3), ImposedGating(random_routing(model.geometry, 3))
    dense, _ = model.denoise(*arguments, executor=DenseExecutor(), gating=gating)
    compact, _ = model.denoise(*arguments, gating=gating)
    return dense, compact


CHANGES: dict[str, Callable[[FluxPipeline], object]] = {
    "attach": with_lora,
    "second": lambda pipeline: with_lora(with_lora(pipeline), 1, "other"),
    "choose": lambda pipeline: with_lora(with_lora(pipeline), 1, "other").set_adapters("style"),
    "scale": lambda pipeline: with_lora(pipeline).set_adapters("style", 0.5),
    "mix": lambda pipeline: with_lora(with_lora(pipeline), 1, "other").set_adapters(
        ["style", "other"], [0.3, -0.8]
    ),
    "disable": lambda pipeline: with_lora(pipeline).disable_lora(),
    "fuse": lambda pipeline: with_lora(pipeline).fuse_lora(),
    "delete": lambda pipeline: with_lora(pipeline).delete_adapters("style"),
    "unload": lambda pipeline: with_lora(pipeline).unload_lora_weights(),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("before", [None, "attach"], ids=["at once", "after a run with it"])
def test_compact_sees_what_is_done_to_adapters(change: str, before: str | None) -> None:
    model = tiny_model("flux").set_execution("compact")
    pipeline = flux_pipeline(model)
    _, plain = both(model)
    if before:
        with_lora(pipeline, 5, "first")
        dense, compact = both(model)
        assert relative_difference(compact, dense) < 1e-5
    CHANGES[change](pipeline)
    dense, compact = both(model)
    assert relative_difference(compact, dense) < 1e-5
    if before is None:
        same = change in ("disable", "delete", "unload")
        assert (relative_difference(compact, plain) < 1e-6) == same


def test_a_scale_for_one_forward_is_seen_and_undone() -> None:
    model = tiny_model("flux").set_execution("compact").set_keep_bias(float("inf"))
    with_lora(flux_pipeline(model))
    keywords = forward_inputs(model)
    full = model(**keywords).sample
    weak = model(**keywords, joint_attention_kwargs={"scale": 0.7}).sample
    assert relative_difference(weak, full) > 0.01
    dense = model.set_execution("dense")(**keywords, joint_attention_kwargs={"scale": 0.7}).sample
    assert relative_difference(weak, dense) < 1e-5
    assert torch.equal(model.set_execution("compact")(**keywords).sample, full)


def test_one_scale_packs_once() -> None:
    """diffusers multiplies and divides scales around a forward; the rounding that is left must not pack everything again."""
    model = tiny_model("flux").set_execution("compact")
    with_lora(flux_pipeline(model))
    keywords = forward_inputs(model) | {"joint_attention_kwargs": {"scale": 0.7}}
    model(**keywords)
    plan = model.current_plan
    for _ in range(5):
        model(**keywords)
    assert model.current_plan is plan
    assert (plan.hits, plan.misses) == (5, 1)


def test_variants_that_are_no_sum_of_weights_are_refused() -> None:
    from peft import LoraConfig

    model = tiny_model("flux").set_execution("compact")
    model.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(DyditError, match="variant of LoRA"):
        model(**forward_inputs(model))
    assert torch.isfinite(model.set_execution("dense")(**forward_inputs(model)).sample).all()


def test_dit_s_layers_take_adapters_too() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_model("dit").set_execution("compact")
    _, before = both(model)
    config = LoraConfig(
        r=2, target_modules=["qkv", "proj", "fc1", "fc2"], init_lora_weights=False, lora_bias=True
    )
    inject_adapter_in_model(config, model.blocks)
    model.requires_grad_(False)
    dense, compact = both(model)
    assert relative_difference(compact, dense) < 1e-5
    assert relative_difference(compact, before) > 1e-3


def test_as_many_weights_as_adapters() -> None:
    model = tiny_model("flux")
    with pytest.raises(DyditError, match="2 adapters and 1 weights"):
        model.set_adapters(["style", "other"], [0.5])
