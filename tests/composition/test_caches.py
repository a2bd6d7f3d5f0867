"""diffusers' step caches on dynamic models: what they reuse, what they leave alone, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
)
from torch import Tensor

from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.export.inline import inline
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from dydit_cli.sampling.generate import generate
from tests.execution.test_pipelines import draw, model_of, pipeline_of
from tests.families.flux_pipelines import flux_pipeline, sampled
from tests.tiny import bits, each_family, predict, relative_difference, tiny_inputs, tiny_model

NEVER, ALWAYS = 0.0, 1e9
"""Thresholds of the first block's change below which the others are skipped."""

OF_BLOCKS: dict[str, Any] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=ALWAYS),
    "magnitudes": lambda: MagCacheConfig(
        threshold=ALWAYS, max_skip_steps=9, retention_ratio=0.0, num_inference_steps=9, mag_ratios=[1.0] * 9
    ),
    "taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=9,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    ),
}
each_cache = pytest.mark.parametrize("cache", OF_BLOCKS)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def steps_of(model: DynamicModel, number: int = 3) -> list[tuple[Tensor, Tensor, Any]]:
    """Inputs of a few steps, every sample of a step at the same timestep."""
    samples, times, condition = tiny_inputs(model, number)
    return [(samples + 0.1 * step, times[step].expand(number), condition) for step in range(number)]


def run(model: DynamicModel, steps: list[tuple[Tensor, Tensor, Any]]) -> tuple[list[Tensor], list[Routing]]:
    """Predictions of some steps of one run, and what was executed."""
    model.begin_run()
    found = [model.denoise(*step) for step in steps]
    return [prediction for prediction, _ in found], [routing for _, routing in found]


def executed(routing: Routing) -> list[bool]:
    """Which blocks ran."""
    return [bool(block.heads.any()) for block in routing.blocks]


@each_family
@pytest.mark.parametrize("execution", ["compact", "dense", "static"])
def test_a_cache_that_never_skips_changes_no_bit(family: Family, execution: str) -> None:
    model = tiny_model(family).set_execution(execution)
    steps = steps_of(model)
    plain, masks = run(model, steps)
    model.enable_cache(FirstBlockCacheConfig(threshold=NEVER))
    cached, masks_of_cached = run(model, steps)
    for with_cache, without in zip(cached, plain, strict=True):
        assert torch.equal(bits(with_cache), bits(without))
    for decided, expected in zip(masks_of_cached, masks, strict=True):
        assert torch.equal(decided.tokens, expected.tokens)
        assert torch.equal(decided.heads, expected.heads)
    model.disable_cache()
    assert torch.equal(bits(model.denoise(*steps[0])[0]), bits(plain[0]))


@each_family
@each_cache
def test_a_repeated_step_is_answered_without_its_blocks(family: Family, cache: str) -> None:
    """Where nothing has changed, what is reused is right: blocks that do not run must not be missed."""
    model = tiny_model(family).set_execution("compact")
    step = steps_of(model)[1]
    expected = predict(model, *step)
    model.enable_cache(OF_BLOCKS[cache]())
    predictions, masks = run(model, [step] * 2)
    for prediction in predictions:
        assert relative_difference(prediction, expected) < 1e-5
    depth = model.geometry.depth
    assert executed(masks[0]) == [True] * depth
    assert executed(masks[1]) == [cache == "first block"] + [False] * (depth - 1)
    assert not masks[1].tokens[:, 1:].any()


@each_cache
def test_a_skipped_step_is_another_prediction(cache: str) -> None:
    model = tiny_model("dit").set_execution("compact")
    steps = steps_of(model)
    plain, _ = run(model, steps)
    model.enable_cache(OF_BLOCKS[cache]())
    cached, masks = run(model, steps)
    assert torch.equal(bits(cached[0]), bits(plain[0]))
    assert not all(executed(masks[1]))
    assert relative_difference(cached[1], plain[1]) > 1e-3


def test_what_is_skipped_is_the_residual_of_the_last_whole_step() -> None:
    """By hand: the first block's own output, and what the others added before."""
    model = tiny_model("dit").set_execution("compact")
    first, second, _ = steps_of(model)
    streams: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, given, tokens: streams.append(tokens))
        for block in (model.blocks[0], model.blocks[-1])
    ]
    run(model, [first, second])
    (head, tail), (head_now, _) = streams[:2], streams[2:]
    for hook in hooks:
        hook.remove()
    last: list[Tensor] = []
    model.final_layer.register_forward_pre_hook(lambda module, given: last.append(given[0]))
    model.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
    run(model, [first, second])
    assert relative_difference(last[1], head_now + (tail - head)) < 1e-5


@each_family
def test_hooks_that_diffusers_functions_attach(family: Family) -> None:
    """Those who call them have imported them before the model was made."""
    model = tiny_model(family).set_execution("compact")
    step = steps_of(model)[0]
    expected = predict(model, *step)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=ALWAYS))
    predictions, masks = run(model, [step] * 2)
    assert relative_difference(predictions[1], expected) < 1e-5
    assert executed(masks[1]) == [True] + [False] * (model.geometry.depth - 1)


@pytest.mark.parametrize("options", [{"token_capacity": 0.5}, {}], ids=["capacity", "gathered"])
def test_steps_are_counted_once(options: dict[str, Any]) -> None:
    """An executor that repeats steps would spend a cache's count on one step."""
    model = tiny_model("dit").set_execution("compact", **options)
    step = steps_of(model)[0]
    expected = predict(model, *step)
    model.enable_cache(
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, use_lite_mode=True)
    )
    _, masks = run(model, [step] * 6)
    assert [all(executed(routing)) for routing in masks] == [True, False, True, False, True, False]
    assert relative_difference(predict(model, *step), expected) < 1e-2


class TestPipelines:
    def test_a_stock_dit_pipeline(self) -> None:
        """It gives no context; a run begins anew all the same."""
        model = model_of()
        pipeline = pipeline_of(model)
        plain = draw(pipeline, 8)
        model.enable_cache(FirstBlockCacheConfig(threshold=NEVER))
        assert torch.equal(draw(pipeline, 8), plain)
        model.disable_cache()
        model.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
        cached = draw(pipeline, 8)
        assert not torch.equal(cached, plain)
        assert torch.equal(draw(pipeline, 8), cached)

    @pytest.mark.parametrize("execution", ["compact", "static"])
    def test_a_stock_flux_pipeline(self, execution: str) -> None:
        """It has a context for each of its two calls a step."""
        pipeline = flux_pipeline(tiny_model("flux").set_execution(execution))
        plain = sampled(pipeline, steps=6)
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=NEVER))
        assert torch.equal(bits(sampled(pipeline, steps=6)), bits(plain))
        pipeline.transformer.disable_cache()
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
        cached = sampled(pipeline, steps=6)
        assert relative_difference(cached, plain) > 1e-3
        assert torch.equal(bits(sampled(pipeline, steps=6)), bits(cached))

    def test_batches_of_our_own_sampler_know_nothing_of_each_other(self) -> None:
        model = tiny_model("dit").set_execution("compact")
        model.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
        settings: dict[str, Any] = {"steps": 4, "sampler": "ddim", "batch_size": 2}
        batches = list(generate(model, num_images=3, **settings))
        assert [len(batch.samples) for batch in batches] == [2, 1]
        again = list(generate(model, num_images=2, **settings))
        assert torch.equal(bits(again[0].samples), bits(batches[0].samples))
        # One whole step of four, and the first of three blocks in the others.
        assert float(batches[0].ratios.max()) < 0.75


def module_of(source: str, folder: Path) -> ModuleType:
    """The code that an export ships, as a module of its own."""
    name = "shipped_code_with_caches"
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(folder))


def test_shipped_code_caches_alike(tmp_path: Path) -> None:
    ours = tiny_model("dit").set_execution("compact")
    shipped = module_of(inline(), tmp_path).DyDiTTransformer2DModel(**ours.config)
    shipped.load_state_dict(ours.state_dict())
    shipped.eval().set_execution("compact")
    steps = steps_of(ours)
    for model in (ours, shipped):
        model.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
    for mine, its in zip(run(ours, steps)[0], run(shipped, steps)[0], strict=True):
        assert torch.equal(bits(mine), bits(its))


class TestRefusals:
    @each_family
    def test_caches_of_attention(self, family: Family) -> None:
        model = tiny_model(family)
        for config in (PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2),):
            with pytest.raises(DyditError, match="FirstBlockCacheConfig"):
                model.enable_cache(config)
        with pytest.raises(DyditError, match="use_lite_mode"):
            model.enable_cache(TaylorSeerCacheConfig())
        assert not model.is_cache_enabled

    def test_taylor_patterns_of_parts_of_blocks(self) -> None:
        model = tiny_model("dit").set_execution("compact")
        with pytest.raises(DyditError, match=r"blocks\.0\.mlp"):
            model.enable_cache(TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.0\.mlp"]))
        model.enable_cache(
            TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d"], taylor_factors_dtype=torch.float32)
        )
        _, masks = run(model, steps_of(model)[:1] * 6)
        assert executed(masks[5]) == [False] * 3

    def test_a_single_block(self) -> None:
        with pytest.raises(DyditError, match="two blocks"):
            tiny_model("dit", num_layers=1).enable_cache(FirstBlockCacheConfig())

    def test_what_stands_between_blocks(self) -> None:
        flux = tiny_model("flux")
        flux.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(DyditError, match="ControlNet"):
            with_residuals(flux)
        video = tiny_model("latte-t2v")
        video.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(DyditError, match="Spatial blocks"):
            video.denoise(*steps_of(video)[0], enable_temporal_attentions=False)


def with_residuals(flux: Any) -> Tensor:
    """A forward as a ControlNet pipeline makes it."""
    geometry = flux.geometry
    _, condition = flux.example_inputs(1, 0)
    found: Tensor = flux(
        hidden_states=torch.zeros(1, geometry.num_tokens, geometry.packed_channels),
        encoder_hidden_states=condition.prompt_embeds,
        pooled_projections=condition.pooled,
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(geometry.num_tokens, 3),
        txt_ids=torch.zeros(geometry.text_tokens, 3),
        guidance=condition.guidance,
        controlnet_block_samples=[torch.zeros(1, geometry.num_tokens, geometry.hidden_size)],
    ).sample
    return found
