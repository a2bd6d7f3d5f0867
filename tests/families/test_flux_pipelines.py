"""A stock FluxPipeline: plans in fp32 and bf16, two sizes, guidance, saving and loading in shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dydit_cli
from dydit_cli.families.flux import DyFluxTransformer2DModel
from tests.families.flux_pipelines import flux_pipeline, sampled
from tests.families.test_flux import static_twin
from tests.tiny import bits, relative_difference, tiny_model


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
def test_the_second_run_asks_no_router(dtype: torch.dtype, size: tuple[int, int]) -> None:
    pipeline = flux_pipeline().to(dtype)
    model = pipeline.transformer.set_execution("compact")
    first = sampled(pipeline, *size)
    plan = model.current_plan
    assert plan.misses == 4
    again = sampled(pipeline, *size)
    assert (plan.misses, plan.hits) == (4, 4 + 8)
    assert torch.equal(bits(first), bits(again))
    if (
        dtype == torch.float32
    ):  # in bf16 tokens on the fence fall on other sides, and four steps carry that on
        model.set_execution("dense")
        assert relative_difference(first, sampled(pipeline, *size)) < 1e-4


def test_a_plan_of_the_scheduler_s_times_has_no_miss() -> None:
    pipeline = flux_pipeline()
    sampled(pipeline)
    plan = pipeline.transformer.plan(pipeline.scheduler.timesteps / 1000)
    sampled(pipeline)
    assert (plan.hits, plan.misses) == (8, 0)
    assert plan.policies


@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
def test_the_complete_model_is_the_static_pipeline(size: tuple[int, int]) -> None:
    model = tiny_model("flux").set_keep_bias(float("inf"))
    expected = sampled(flux_pipeline(static_twin(model)), *size)
    for execution in ("static", "dense"):
        assert torch.equal(
            bits(sampled(flux_pipeline(model.set_execution(execution)), *size)), bits(expected)
        )
    assert relative_difference(sampled(flux_pipeline(model.set_execution("compact")), *size), expected) < 1e-5


def test_saved_in_shards_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("flux")
    expected = sampled(flux_pipeline(model.set_execution("compact")))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for loaded in (DyFluxTransformer2DModel.from_pretrained(tmp_path), dydit_cli.load_model(tmp_path)):
        assert loaded.execution == "compact"
        assert torch.equal(bits(sampled(flux_pipeline(loaded.eval()))), bits(expected))


def test_pictures_come_out() -> None:
    pipeline = flux_pipeline()
    images = sampled(pipeline, output_type="pt")
    assert images.shape == (2, 3, 16, 16)
    assert torch.isfinite(images).all()
