"""From seconds to rows, and from rows to a picture and a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.benchmarking.plots import bench_figure
from dydit_cli.benchmarking.writing import write_bench
from tests.benchmarking.reports import report, row


def test_a_row_is_the_median_of_paired_ratios() -> None:
    made = row()
    assert made.time_ratio == pytest.approx(0.55)
    assert made.interval == pytest.approx((0.55, 0.55))
    assert made.efficiency == pytest.approx(0.9)
    assert made.dense_ratio == pytest.approx(1.2)
    assert (made.static, made.static_ms, made.pairs) == ("dydit", 1500, 3)
    assert made.compiled is None


def test_the_baseline_is_the_faster_static_model() -> None:
    made = row(seconds={"diffusers": [0.9, 1.8, 1.35]})
    assert (made.static, made.static_ms) == ("diffusers", pytest.approx(1350))
    assert made.time_ratio == pytest.approx(0.55 / 0.9)
    assert made.dydit_static_ms == 1500


def test_compiled_is_compared_with_compiled() -> None:
    seconds = {"compiled_static": [0.8, 0.8, 0.8], "compiled": [0.4, 0.4, 0.4]}
    compiled = row(seconds=seconds).compiled
    assert compiled is not None
    assert compiled.time_ratio == pytest.approx(0.5)
    assert compiled.efficiency == pytest.approx(0.99)


def test_times_are_those_of_one_forward() -> None:
    made = row(forwards=5)
    assert made.static_ms == 300
    assert made.time_ratio == pytest.approx(0.55)


def test_the_picture_shows_every_row_and_what_is_promised() -> None:
    compiled = {"compiled_static": [0.8, 0.8, 0.8], "compiled": [0.4, 0.4, 0.4]}
    figure = bench_figure(report(row(), row(batch=1, seconds=compiled), row(steps=25, batch=64)))
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.split("\n")[0] for label in labels] == ["4 images", "1 image", "64 images, 25 steps"]
    assert [bar.get_width() for bar in axes.patches] == [0.495] * 3
    said = {text.get_text() for text in axes.texts}
    assert {"0.550", "0.90", "0.500", "0.99"} <= said


def test_a_folder_holds_the_numbers_the_picture_and_how(own_folder: Path) -> None:
    files = write_bench("bench", report(row()))
    assert files == ["bench.json", "bench.png"]
    content = json.loads(Path("bench/bench.json").read_text())
    assert content["rows"][0]["time_ratio"] == pytest.approx(0.55)
    assert Path("bench/bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("bench/manifest.json").read_text())["stage"] == "bench"
