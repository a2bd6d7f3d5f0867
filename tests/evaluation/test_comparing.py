"""Comparisons: what is found, joined and warned of, and the text forms."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.gathering import gather
from dydit_cli.evaluation.metrics.measure import Measure
from dydit_cli.evaluation.tables import as_text, header, rows, with_error


def evaluation(folder: Path, value: float = 12.345, **changes: Any) -> Path:
    """A folder with a report of the form that `dydit evaluate` writes."""
    folder.mkdir(parents=True)
    content = {
        "schema": 1,
        "images": 500,
        "subject": {
            "path": "runs/t",
            "weights_sha256": "w" * 64,
            "made_by": {"sampler": "ddim", "steps": 25, "guidance": 1.5, "execution": "compact"},
        },
        "extractor": {"name": "fashion-mnist", "sha256": "e" * 64},
        "reference": {"path": "fashion-mnist"},
        "metrics": {
            "frechet": {"value": value, "low": value - 0.31, "high": value + 0.31, "method": "delta method"}
        },
        "pairs": None,
        "cost": {
            "parameters": 1900000,
            "static_mmacs": 83.28,
            "mmacs": 43.41,
            "ratio": {"value": 0.51, "low": 0.509, "high": 0.511, "method": "bootstrap"},
            "seconds_per_image": {"value": 0.05, "low": 0.049, "high": 0.052, "method": "bootstrap"},
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(content | changes))
    return folder


def profile(folder: Path, weights: str = "w" * 64) -> Path:
    folder.mkdir(parents=True)
    content = {
        "params": {"total": 1900000, "routers": 50000, "static": 1850000},
        "gmacs": 0.0434,
        "static_gmacs": 0.0833,
        "ratio": 0.508,
        "latency": {"ratio": 0.7, "interval": [0.68, 0.73]},
    }
    (folder / "profile.json").write_text(json.dumps(content))
    (folder / "manifest.json").write_text(json.dumps({"parent": {"weights_sha256": weights}}))
    return folder


def test_a_profile_joins_the_evaluation_of_its_weights(tmp_path: Path) -> None:
    found = gather([evaluation(tmp_path / "e"), profile(tmp_path / "p"), profile(tmp_path / "other", "x")])
    assert [run.name for run in found.runs] == ["e", "other"]
    joined = found.runs[0].values
    assert joined["time_ratio"] == Measure(0.7, 0.68, 0.73, "bootstrap")
    # What was measured on the samples' own trajectories is not replaced.
    assert joined["ratio"].value == 0.51
    assert found.runs[1].values["ratio"].value == 0.508
    assert found.warnings == []


def test_a_run_folder_holds_its_parts(tmp_path: Path) -> None:
    evaluation(tmp_path / "run" / "evaluation")
    profile(tmp_path / "run" / "profile")
    (run,) = gather([tmp_path / "run"]).runs
    assert {"frechet", "time_ratio", "seconds_per_image"} <= set(run.values)


def test_names_are_told_apart(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name / "evaluation") for name in ("a", "b")]
    assert [run.name for run in gather(folders).runs] == ["a/evaluation", "b/evaluation"]
    # One that is named twice is one.
    assert len(gather([folders[0], folders[0]]).runs) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extractor": {"name": "inception", "sha256": "f" * 64}}, "different feature networks"),
        ({"reference": {"path": "other.npz"}}, "different references"),
        ({"images": 501}, "500, 501 images"),
        ({"subject": {"made_by": {"sampler": "ddpm", "steps": 25}}}, "sampled differently"),
    ],
)
def test_what_cannot_be_compared_is_warned_of(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    found = gather([evaluation(tmp_path / "a"), evaluation(tmp_path / "b", **changes)])
    assert len(found.warnings) == 1
    assert said in found.warnings[0]


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (Measure(12.345, 12.035, 12.655), "12.35 ± 0.31"),
        (Measure(0.5077, 0.5067, 0.5087), "0.5077 ± 0.0010"),
        (Measure(1234.5, 1214.5, 1254.5), "1234 ± 20"),
        (Measure(83.28), "83.28"),
        (Measure(1.0), "1"),
        (Measure(0.5, 0.5, 0.5), "0.5"),
        (None, ""),
    ],
)
def test_values_have_the_digits_that_their_error_leaves(measure: Measure | None, text: str) -> None:
    assert with_error(measure) == text


def test_markdown(tmp_path: Path) -> None:
    text = as_text(gather([evaluation(tmp_path / "a|b")]).runs, "markdown")
    lines = text.splitlines()
    assert len(lines) == 3
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "| a\\|b | ddim 25, guidance 1.5 | 500 | 12.35 ± 0.31 |" in lines[2]
    assert "Fréchet ↓" in lines[0]


def test_csv_has_whole_numbers_and_both_ends(tmp_path: Path) -> None:
    runs = gather([evaluation(tmp_path / "a,b"), profile(tmp_path / "p", "x")]).runs
    first, second = csv.DictReader(io.StringIO(as_text(runs, "csv")))
    assert first["run"] == "a,b"
    assert float(first["frechet_low"]) == 12.345 - 0.31
    assert float(first["seconds_per_image"]) == 0.05
    assert second["frechet"] == ""


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    text = as_text(gather([evaluation(tmp_path / "a_b&50%")]).runs, "latex")
    assert r"a\_b\&50\%" in text
    assert r"12.35 $\pm$ 0.31" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = text.splitlines()[0].partition("{tabular}{")[2].rstrip("}")
    assert {line.replace(r"\&", "").count("&") + 1 for line in body} == {len(columns)}
    for begin, end in (("\\begin{tabular}", "\\end{tabular}"), ("\\toprule", "\\bottomrule")):
        assert text.count(begin) == text.count(end) == 1


def test_columns_are_those_that_any_run_fills(tmp_path: Path) -> None:
    runs = gather([evaluation(tmp_path / "a")]).runs
    assert header(runs) == [
        "run", "sampling", "N", "Fréchet ↓", "ratio ↓", "MMACs ↓", "M params ↓", "ms/image ↓",
    ]  # fmt: skip
    assert rows(runs)[0][-2:] == ["1.9", "50.0 ± 1.5"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="nothing to compare"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(DyditError, match="nothing to compare"):
        gather([tmp_path])
    broken = evaluation(tmp_path / "broken")
    (broken / "evaluation.json").write_text("{")
    with pytest.raises(DyditError, match="cannot be read"):
        gather([broken])
    with pytest.raises(DyditError, match="not an evaluation that this dydit reads"):
        gather([evaluation(tmp_path / "new", schema=9)])
    with pytest.raises(DyditError, match="did you mean 'latex'"):
        as_text(gather([evaluation(tmp_path / "a")]).runs, "latx")
