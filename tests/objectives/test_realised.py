"""The realised ratio is that of thresholds on the held-out samples, and comparisons use the same draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dydit_cli.data.images import ArrayImages
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives import HeldOutDraws, held_out_loss, held_out_ratio, measure, objective_for
from tests.objectives.base_models import tiny_model


def held_out(count: int = 40) -> ArrayImages:
    images = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    return ArrayImages(images, torch.arange(count) % 3, padding=0, kind="test", path=Path())


def half_on(model: DynamicTransformer) -> DynamicTransformer:
    """Routers whose decisions differ by unit, timestep and token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.router_parameters():
            parameter.normal_(std=1.0)
    return model.set_execution("dense")


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_untrained_routers_keep_everything(family: str) -> None:
    report = held_out_ratio(tiny_model(family), held_out(), objective_for(family), timesteps=5)
    assert (report.ratio, report.heads, report.groups, report.tokens) == (1.0, 1.0, 1.0, 1.0)
    assert report.standard_error == 0.0
    assert report.images == 40


def test_ratio_is_the_mean_over_every_image_and_timestep() -> None:
    model, objective, source = half_on(tiny_model()), objective_for("dit"), held_out()
    report = held_out_ratio(model, source, objective, timesteps=5, per_image=5, batch_size=7)
    draws = HeldOutDraws(source, objective, timesteps=5, per_image=5)
    ratios = []
    for batch in draws.batches("cpu"):
        routing = model.routing(batch.t, objective.noised(batch.clean, batch.noise, batch.t), batch.condition)
        ratios.append(executed_ratio(routing, model.geometry))
    assert sum(map(len, ratios)) == 200
    assert report.ratio == pytest.approx(float(torch.cat(ratios).mean()), abs=1e-6)
    assert 0.0 < report.ratio < 1.0
    assert [level.t for level in report.per_timestep] == [100.0, 300.0, 500.0, 700.0, 900.0]
    assert report.ratio == pytest.approx(sum(level.ratio for level in report.per_timestep) / 5)


def test_images_are_spread_evenly_over_timesteps() -> None:
    draws = HeldOutDraws(held_out(), objective_for("dit"), images=30, timesteps=10)
    sizes = [len(batch.t) for batch in draws.batches("cpu")]
    assert sizes == [3] * 10
    twice = HeldOutDraws(held_out(), objective_for("dit"), images=30, timesteps=10, per_image=2)
    assert [len(batch.t) for batch in twice.batches("cpu")] == [6] * 10


def test_losses_are_repeatable_and_alike_in_both_executions() -> None:
    model, objective, source = half_on(tiny_model()), objective_for("dit"), held_out()
    dense = held_out_loss(model, source, objective, executor=DenseExecutor())
    assert dense == held_out_loss(model, source, objective, executor=DenseExecutor())
    assert dense == pytest.approx(
        held_out_loss(model, source, objective, executor=CompactExecutor()), rel=1e-5
    )
    losses = measure(model, HeldOutDraws(source, objective)).losses
    assert losses["loss"] == pytest.approx(losses["mse"] + losses["vb"])
    assert dense != held_out_loss(model, source, objective, seed=1)


def test_fewer_samples_than_timesteps_still_see_every_timestep() -> None:
    draws = HeldOutDraws(held_out(), objective_for("dit"), images=7, timesteps=50)
    seen = [float(batch.t[0]) for batch in draws.batches("cpu")]
    assert len(set(seen)) == 50
