"""A target of time: the table's interpolation and gradient, its measurement, and a run that is led by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import load_model, write_json
from dydit_cli.benchmarking.latency_table import check_table, measure_table, points_of
from dydit_cli.benchmarking.masks import Case
from dydit_cli.cli.app import main
from dydit_cli.cli.finetune import judgement
from dydit_cli.dynamic.latency import LatencyTable, interpolated, read_table
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.errors import DyditError
from dydit_cli.training import fine_tune, prepare
from tests.tiny import tiny_model
from tests.training.runs import metrics_of, settings_for

TABLE = LatencyTable(
    family="dit",
    num_heads=4,
    num_groups=4,
    depth=2,
    num_tokens=16,
    heads=(1, 2, 4),
    attention=(0.6, 0.75, 1.05),
    groups=(1, 4),
    tokens=(0.0, 0.5, 1.0),
    mlp=((0.5, 0.6, 0.7), (0.55, 0.8, 1.05)),
    complete=1.05,
)


def routing_of(heads: int, groups: int, tokens: float, blocks: int = 2) -> Routing:
    def mask(on: int, count: int) -> torch.Tensor:
        return (torch.arange(count) < on).float().repeat(3, 1)

    block = BlockRouting(mask(heads, 4), mask(groups, 4), mask(round(16 * tokens), 16))
    return Routing((block,) * blocks)


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "time"),
    [
        (4, 4, 1.0, 1.05),
        (1, 4, 1.0, 0.6),
        (3, 4, 1.0, 0.9),
        (4, 1, 0.5, 0.6),
        (4, 4, 0.25, 0.675),
        (4, 2, 0.5, 0.6 + 0.2 / 3),
        (1, 1, 0.0, 0.6 + 0.5 - 1.05),
    ],
)
def test_points_and_what_lies_between_them(heads: int, groups: int, tokens: float, time: float) -> None:
    assert TABLE.ratio(routing_of(heads, groups, tokens)).tolist() == pytest.approx([time] * 3, abs=1e-6)


def test_blocks_are_averaged_and_masks_have_a_gradient() -> None:
    low, high = routing_of(1, 4, 1.0).blocks[0], routing_of(4, 4, 1.0).blocks[0]
    heads = low.heads.clone().requires_grad_()
    tokens = low.tokens.clone().requires_grad_()
    ratio = TABLE.ratio(Routing((replace(low, heads=heads, tokens=tokens), high)))
    assert ratio.tolist() == pytest.approx([(0.6 + 1.05) / 2] * 3)
    ratio.sum().backward()
    assert heads.grad is not None
    assert tokens.grad is not None
    assert float(heads.grad.min()) > 0, "one head more costs time"
    assert float(interpolated(torch.tensor([9.0]), (0, 1), (2.0, 3.0))) == 3.0


def test_a_run_is_led_to_its_share_of_time(tmp_path: Path) -> None:
    write_json(tmp_path / "table.json", TABLE.as_json())
    settings = settings_for(
        tmp_path,
        fresh_routers=True,
        target="latency",
        latency_table=str(tmp_path / "table.json"),
        target_ratio=0.7,
        steps=120,
        batch_size=16,
        ramp_steps=50,
        router_learning_rate=0.05,
        ratio_weight=10.0,
        calibrate=True,
        log_every=40,
        evaluate_every=0,
        checkpoint_every=0,
    )
    geometry = prepare(settings.model_copy(update={"target": "macs"})).model.geometry
    shape = (geometry.num_heads, geometry.num_groups, geometry.depth, geometry.num_tokens)
    assert shape == (4, 4, 2, 16), "the table above is written for this model"
    result = fine_tune(settings)
    # One head or group of so small a model is worth several hundredths, so that nothing lies nearer.
    assert result.time_ratio == pytest.approx(0.7, abs=0.03)
    assert result.ratio != pytest.approx(result.time_ratio, abs=0.005), "time is not arithmetic here"
    assert judgement(result) == []
    assert metrics_of(tmp_path / "t")[-1]["target"] == 0.7


def test_what_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    settings = settings_for(tmp_path, target="latency", latency_table=str(path))
    with pytest.raises(DyditError, match="not a latency table"):
        prepare(settings)
    write_json(path, replace(TABLE, depth=28).as_json())
    with pytest.raises(DyditError, match="measured on another model"):
        prepare(settings)
    write_json(path, replace(TABLE, complete=0.6).as_json())
    with pytest.raises(DyditError, match=r"0.45 of the static model's time cannot be reached"):
        prepare(settings.model_copy(update={"target_ratio": 0.45}))
    write_json(path, TABLE.as_json())
    assert read_table(path) == replace(TABLE, measured={})
    with pytest.raises(ValueError, match="needs a latency_table"):
        settings_for(tmp_path, target="latency")


def test_measuring_and_checking() -> None:
    model = tiny_model("dit")
    sample, condition = model.example_inputs(2, 0)
    inputs = (sample, torch.full((2,), 500.0), condition)
    ticks = iter(range(1_000_000))
    table = measure_table(model, inputs, rounds=2, clock=lambda: float(next(ticks)))
    # Every forward takes one tick of this clock, so that every ratio is one.
    assert set(table.attention) == {1.0}
    assert table.complete == 1.0
    assert table.heads[0] == 1
    assert table.heads[-1] == model.geometry.num_heads
    assert table.tokens[-1] == 1.0
    assert table.measured["batch"] == 2
    found = check_table(model, table, [inputs], rounds=2, clock=lambda: float(next(ticks)))
    assert found.predicted == pytest.approx(1.0)
    assert found.measured == 1.0


def test_points_are_what_they_say() -> None:
    model = tiny_model("dit")
    sample, condition = model.example_inputs(3, 0)
    inputs = (sample, torch.full((3,), 500.0), condition)
    heads, groups = model.geometry.num_heads, model.geometry.num_groups
    cases = [Case(heads, groups, 0.0), Case(heads, 2, 0.5), Case(1, groups, 1.0), Case(heads, groups, 0.25)]
    for point in points_of(model, cases, inputs, seed=0):
        with torch.no_grad():
            point.impose(model)
            routing = model.denoise(*inputs)[1]
        for block in routing.blocks:
            assert block.heads.sum(dim=1).tolist() == [point.case.heads] * 3
            assert block.groups.sum(dim=1).tolist() == [point.case.groups] * 3
            assert float(block.tokens.float().mean()) == pytest.approx(point.case.tokens, abs=0.05)


def test_families_without_a_table_are_refused() -> None:
    for family in ("latte", "flux"):
        model = tiny_model(family)
        with pytest.raises(DyditError, match="no latency table"):
            measure_table(model, (torch.zeros(1), torch.zeros(1), torch.zeros(1)), rounds=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(tmp_path)
    file = tmp_path / "table.json"
    words = ["bench", "--model", settings.model, "--batch", "2", "--pairs", "1", "--device", "cpu"]
    assert main([*words, "--latency-table", str(file)]) == 0
    assert "heads, the rest on" in capsys.readouterr().out
    assert json.loads(file.read_text())["family"] == "dit"
    assert main([*words, "--latency-table", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--check-table", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["difference"] == pytest.approx(found["predicted"] - found["measured"])
    assert load_model(settings.model).family == "dit"
