"""CUDA graphs and capacities as sides of a benchmark, with a recorder that stands in for CUDA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dydit_cli.artifacts import save_model
from dydit_cli.benchmarking.bench import bench
from dydit_cli.benchmarking.compiling import Acceleration
from dydit_cli.benchmarking.plots import bench_figure
from dydit_cli.benchmarking.service import serve
from dydit_cli.benchmarking.settings import BenchSettings
from dydit_cli.cli.bench_tables import bench_table
from dydit_cli.errors import DyditError
from dydit_cli.execution import graphs
from dydit_cli.execution.capacity import CapacityExecutor
from tests.benchmarking.reports import report, row
from tests.execution.standin import StandInRecorder
from tests.tiny import tiny_model


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[graphs.StepGraphs]:
    """Record on the CPU; what was recorded is in the list, by executor."""
    made: list[graphs.StepGraphs] = []
    plain = graphs.StepGraphs.__init__

    def kept(self: graphs.StepGraphs, *arguments: Any) -> None:
        plain(self, *arguments)
        made.append(self)

    monkeypatch.setattr(graphs.StepGraphs, "__init__", kept)
    monkeypatch.setattr(graphs, "cuda_recorder", StandInRecorder)
    for home in ("dydit_cli.execution.graphs", "dydit_cli.benchmarking.settings"):
        monkeypatch.setattr(f"{home}.require_cuda", lambda device=None: None)
    return made


def settings(**changes: Any) -> BenchSettings:
    quick = {"preset": "dit-s/8", "blocks": 1, "batch": (2,), "pairs": 1, "dense": False}
    return BenchSettings(**(quick | changes))


@pytest.mark.parametrize("steps", [None, 2])
def test_graphs_beside_eager_execution(stand_in: list[graphs.StepGraphs], steps: int | None) -> None:
    (found,) = bench(settings(graphs=True, heads=3, groups=4, tokens=(0.7,), steps=steps)).rows
    assert found.graphed is not None
    assert found.compiled is None
    assert found.graphed.efficiency == pytest.approx(found.ideal / found.graphed.time_ratio)
    # What is timed is played back: warm-ups have seen and recorded it.
    static, compact = sorted(each.recorded for each in stand_in if each.replays)
    assert (static, compact) == (1, 1)


def test_graphs_in_the_service(stand_in: list[graphs.StepGraphs], own_folder: Any) -> None:
    (own_folder / "model").mkdir()
    save_model(tiny_model("dit"), own_folder / "model")
    made = serve(BenchSettings(model="model", batch=(2,), steps=2, pairs=2, graphs=True))
    assert [row.execution for row in made.rows] == ["static", "compact", "graphed_static", "graphed"]
    assert list(made.cold_start) == ["static", "compact"]
    assert any(each.replays for each in stand_in)


def test_a_capacity_is_that_of_compact_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    plain = CapacityExecutor.run_step

    def noted(self: CapacityExecutor, step: Any) -> Any:
        shares.append(self.share)
        return plain(self, step)

    monkeypatch.setattr(CapacityExecutor, "run_step", noted)
    (found,) = bench(settings(tokens=(0.5,), token_capacity=0.75)).rows
    assert set(shares) == {0.75}
    assert found.difference_to_dense is not None
    assert found.difference_to_dense < 1e-5


def test_nothing_is_accelerated_unless_asked_for() -> None:
    assert Acceleration().models(tiny_model()) == {}


def test_without_cuda_graphs_are_refused() -> None:
    for run in (bench, serve):
        with pytest.raises(DyditError, match="CUDA graphs need a CUDA device"):
            run(settings(graphs=True), torch.device("cpu"))


def test_a_capacity_is_a_share() -> None:
    with pytest.raises(DyditError, match=r"share of 1\.5 for --token-capacity"):
        settings(token_capacity=1.5)


def test_tables_and_pictures_show_graphs() -> None:
    seconds = {"graphed_static": [0.5, 0.5, 0.5], "graphed": [0.3, 0.3, 0.3]}
    made = report(row(seconds=seconds), row(batch=1, seconds=seconds))
    table = bench_table(made)
    assert [column.header for column in table.columns][-3:] == ["graphs", "95% interval", "efficiency"]
    assert list(table.columns[-3].cells) == ["0.600", "0.600"]
    (axes,) = bench_figure(made).axes
    assert [text.get_text() for text in axes.texts].count("0.600") == 2
