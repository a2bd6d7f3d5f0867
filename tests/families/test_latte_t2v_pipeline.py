"""A converted text-to-video Latte in diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LattePipeline

import dydit_cli
from tests.families.latte_t2v import dynamic_model, sampled, stock_model, stock_pipeline
from tests.tiny import relative_difference


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock pipeline as people have it on their disks."""
    stock_pipeline(stock_model()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_converted_pipeline_makes_the_same_video(folder: Path) -> None:
    """The snippet of docs/latte_t2v.md: convert the folder, load, and hand the model to the stock pipeline."""
    stock = LattePipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    expected = sampled(stock)
    dydit_cli.convert(folder, out="converted")
    transformer = dydit_cli.load_model("converted")
    assert transformer.execution == "compact"
    pipeline = LattePipeline.from_pretrained(folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer is transformer
    assert relative_difference(sampled(pipeline), expected) < 1e-5
    transformer.set_execution("static")
    assert torch.equal(sampled(pipeline), expected)


def test_half_of_the_units_off_compact_is_dense() -> None:
    """Guided; a larger dial gives another picture."""
    model = dynamic_model(stock_model(), balanced=True)
    pipeline = stock_pipeline(model)
    dense = sampled(pipeline)
    model.set_execution("compact")
    assert relative_difference(sampled(pipeline), dense) < 1e-4
    model.set_keep_bias(float("inf"))
    assert relative_difference(sampled(pipeline), dense) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_run_asks_no_width_router(dtype: torch.dtype) -> None:
    """The pipeline knows nothing of plans: one grows from the timesteps that it sends."""
    model = dynamic_model(stock_model(), balanced=True).set_execution("compact")
    pipeline = stock_pipeline(model).to(dtype)
    sampled(pipeline)
    plan = model.current_plan
    assert plan is not None
    assert (plan.hits, plan.misses) == (0, 3)
    sampled(pipeline)
    assert (plan.hits, plan.misses) == (3, 3)
    announced = model.plan(pipeline.scheduler.timesteps)
    sampled(pipeline)
    assert (announced.hits, announced.misses) == (3, 0)


@pytest.mark.parametrize(
    "options", [{"video_length": 1}, {"enable_temporal_attentions": False}, {"guidance_scale": 1.0}], ids=str
)
def test_the_pipelines_own_options(options: dict[str, object]) -> None:
    stock = stock_model()
    expected = sampled(stock_pipeline(stock), **options)
    model = dynamic_model(stock).set_execution("static")
    assert torch.equal(sampled(stock_pipeline(model), **options), expected)
