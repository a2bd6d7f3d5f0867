"""`dydit bench` on the smallest preset: JSON for scripts, tables for people, a folder on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.cli.app import main
from dydit_cli.cli.bench_tables import seconds, span

QUICK = ["bench", "--preset", "dit-s/8", "--blocks", "1", "--batch", "1", "--pairs", "1", "--device", "cpu"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--heads", "3", "--groups", "4", "--tokens", "0.7", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"rows", "device", "threads", "versions", "settings"} <= set(report)
    (row,) = report["rows"]
    assert {"batch", "ideal", "time_ratio", "interval", "efficiency", "static_ms", "compact_ms"} <= set(row)
    assert row["heads"] == 0.5
    low, high = row["interval"]
    assert low <= row["time_ratio"] <= high


def test_a_table_and_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--ratio", "0.3,0.6", "--out", "b"]) == 0
    captured = capsys.readouterr()
    assert "efficiency" in captured.out
    assert len(json.loads(Path("b/bench.json").read_text())["rows"]) == 2
    assert Path("b/bench.png").exists()
    assert main([*QUICK, "--out", "b"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_half_of_the_work_is_the_default_and_all_is_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["ratio"] == pytest.approx(0.5, abs=0.03)
    assert main([*QUICK, "--heads", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["case"] == "everything on"


def test_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--service", "--steps", "1", "--out", "s"]) == 0
    assert "images a minute" in capsys.readouterr().out
    assert json.loads(Path("s/service.json").read_text())["cold_start"]["compact"]["load"] is None


def test_a_long_benchmark_warns_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dydit_cli.cli.bench.LONG_SECONDS", 0.0)
    assert main(QUICK) == 0
    assert "this will take about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratio", "0.5", "--heads", "3"], "--ratio does not go with"),
        (["--batch", "1,x"], "--batch 1,x cannot be read"),
        (["--heads", "12"], "12 heads cannot be on"),
        (["--preset", "dit-xxl/2"], "no preset called"),
        (["--model", "nowhere"], "not both"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *words]) == 2
    assert said in capsys.readouterr().err


def test_spans() -> None:
    assert [seconds(value) for value in (0, 0.01234, 4.561)] == ["0", "12.3 ms", "4.56 s"]
    assert [span(value) for value in (40, 720, 9000)] == ["40 s", "12 min", "2.5 h"]
