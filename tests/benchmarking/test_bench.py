"""What a benchmark runs is right. How fast that is, is not a matter for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_cli.artifacts import save_model
from dydit_cli.benchmarking.baseline import DiffusersStatic, diffusers_baseline
from dydit_cli.benchmarking.bench import bench
from dydit_cli.benchmarking.runs import sample_batch, trajectory_ideal, twin_of
from dydit_cli.benchmarking.service import serve
from dydit_cli.benchmarking.settings import BenchSettings
from dydit_cli.benchmarking.subjects import open_subject
from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import StaticExecutor
from dydit_cli.flops import macs_of
from tests.tiny import tiny_inputs, tiny_model

CPU = torch.device("cpu")


def settings(**changes: Any) -> BenchSettings:
    """The smallest benchmark: one block of DiT-S with 16 tokens, one round."""
    quick = {"preset": "dit-s/8", "blocks": 1, "batch": (1,), "pairs": 1}
    return BenchSettings(**(quick | changes))


@pytest.fixture
def folder(own_folder: Path) -> str:
    """A model's folder."""
    out = own_folder / "model"
    out.mkdir()
    save_model(tiny_model("dit"), out)
    return str(out)


@pytest.mark.parametrize("masks", ["scattered", "prefix", "changing"])
def test_the_forwards_of_a_preset(masks: str) -> None:
    chosen = settings(preset="dit-b/4", heads=6, groups=8, tokens=(0.7,), batch=(1, 2), masks=masks, pairs=2)
    told: list[tuple[str, int, int]] = []
    estimates: list[float] = []
    report = bench(chosen, on_progress=lambda *progress: told.append(progress), on_estimate=estimates.append)
    assert [row.batch for row in report.rows] == [1, 2]
    for row in report.rows:
        assert (row.heads, row.groups) == (0.5, pytest.approx(8 / 12))
        assert row.tokens == pytest.approx(0.7, abs=0.01)
        assert row.difference_to_dense is not None
        assert row.difference_to_dense < 1e-5
        # Everything counts: embeddings and adaLN too.
        assert row.ratio < row.ideal < 1
        assert row.efficiency == pytest.approx(row.ideal / row.time_ratio)
        assert row.static_ms == min(row.dydit_static_ms, row.diffusers_static_ms or 0)
        assert row.dense_ratio is not None
    assert (report.clock, report.threads, len(estimates)) == ("cpu", 1, 1)
    # Four sides, two warm-ups and two rounds, all counted.
    assert told[-1][1:] == (16, 16)


def test_the_blocks_of_dit_xl() -> None:
    """The case that published measurements refer to has the ideal that they state."""
    from dydit_cli.benchmarking.masks import Case
    from tests.tiny import uniform_routing

    subject = open_subject(settings(preset="dit-xl/2", blocks=2, heads=8, groups=11, tokens=(0.7,)), CPU)
    assert subject.cases == (Case(8, 11, 0.7),)
    geometry = subject.model.geometry
    routing = uniform_routing(geometry, 1, heads=8, groups=11, tokens=179)
    assert macs_of(geometry, routing).total / macs_of(geometry).total == pytest.approx(0.494, abs=2e-3)


def test_everything_on_is_ideal_one_and_a_little_for_the_routers() -> None:
    (row,) = bench(settings(dense=False)).rows
    assert row.case == "everything on"
    assert 1 < row.ideal < 1.02
    assert row.dense_ratio is None


def test_ratios_give_a_row_each() -> None:
    report = bench(settings(ratio=(0.3, 0.6)))
    assert [round(row.ratio, 1) for row in report.rows] == [0.3, 0.6]


def test_a_model_runs_with_its_own_routing_over_its_schedule(folder: str) -> None:
    (row,) = bench(BenchSettings(model=folder, batch=(2,), pairs=1)).rows
    assert row.case == "live routing"
    assert 0 < row.ratio < 1


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_whole_sampling_runs(family: str, own_folder: Path) -> None:
    out = own_folder / family
    out.mkdir()
    save_model(tiny_model(family), out)
    (row,) = bench(BenchSettings(model=str(out), batch=(2,), steps=2, pairs=1)).rows
    assert row.steps == 2
    assert row.ideal == pytest.approx(trajectory_ideal(tiny_model(family).geometry, row.ratio))
    assert row.ratio < row.ideal


def test_the_ideal_of_a_trajectory_is_linear_in_its_ratio() -> None:
    geometry = tiny_model("dit").geometry
    static = macs_of(geometry)
    assert trajectory_ideal(geometry, 1.0) > 1
    step = trajectory_ideal(geometry, 0.6) - trajectory_ideal(geometry, 0.5)
    assert step == pytest.approx(0.1 * static.routed / static.total_without_layernorm)


def test_twins_share_weights_and_nothing_else() -> None:
    model = tiny_model("dit")
    compact, static = twin_of(model, "compact"), twin_of(model, "static")
    assert (compact.execution, static.execution, model.execution) == ("compact", "static", "dense")
    assert compact.x_embedder is model.x_embedder
    options = {"batch": 2, "steps": 3, "guidance": 1.5, "seed": 0}
    assert float(sample_batch(compact, **options).ratios.mean()) < 1
    assert float(sample_batch(static, **options).ratios.mean()) == 1


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_diffusers_baseline_is_called_and_sized_as_ours(family: str) -> None:
    model = tiny_model(family)
    baseline = DiffusersStatic(model, 0)
    inputs = tiny_inputs(model, 3)
    ours, _ = model.denoise(*inputs, executor=StaticExecutor(), gating=CompleteGating())
    theirs, routing = baseline.denoise(*inputs)
    assert theirs.shape == ours.shape
    assert routing.tokens.shape == (3, 3, 16)
    blocks = [
        sum(
            p.numel() for name, p in blocks.named_parameters() if "router" not in name and ".emb." not in name
        )
        for blocks in (model.blocks, baseline.transformer.transformer_blocks)
    ]
    assert blocks[0] == blocks[1]
    assert diffusers_baseline(tiny_model(family, mlp_hidden_size=96), 0) is None


def test_the_service_sees_requests_a_start_and_memory(folder: str) -> None:
    report = serve(BenchSettings(model=folder, batch=(1, 2), steps=2, pairs=2))
    assert [(row.execution, row.batch) for row in report.rows] == [
        ("static", 1), ("compact", 1), ("static", 2), ("compact", 2),
    ]  # fmt: skip
    for row in report.rows:
        assert 0 < row.p50_s <= row.p95_s
        assert row.peak_mib is not None
        assert row.peak_mib > report.weights_mib
        assert (row.ratio == 1) == (row.execution == "static")
    assert report.clock == "wall"
    static, compact = report.cold_start["static"], report.cold_start["compact"]
    assert static.plan == 0 < compact.plan
    assert compact.total == pytest.approx((compact.load or 0) + compact.plan + compact.pack)
    assert serve(settings(steps=1)).cold_start["static"].load is None


def test_threads_are_set_back() -> None:
    before = torch.get_num_threads()
    report = bench(settings(threads=2))
    assert (report.threads, report.clock) == (2, "wall")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"preset": None}, "neither is given"),
        ({"model": "m"}, "not both"),
        ({"batch": (0,)}, "--batch is too small"),
        ({"pairs": 0}, "--pairs is too small"),
        ({"tokens": (1.5,)}, "share of 1.5"),
        ({"masks": "prefixes"}, "'prefixes' is not a choice for --masks"),
        ({"masks": "changing", "steps": 2}, "--masks changing does not go with --steps"),
        ({"clock": "sun"}, "--clock"),
        ({"preset": None, "model": "m", "blocks": None, "heads": 3}, "--heads does not go with --model"),
    ],
)
def test_what_cannot_be_measured(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DyditError) as caught:
        settings(**wrong)
    assert said in caught.value.what


def test_processor_time_is_for_processors() -> None:
    assert settings().clock_name(torch.device("cuda")) == "wall"
    with pytest.raises(DyditError, match="cuda"):
        settings(clock="cpu").clock_name(torch.device("cuda"))
