"""`dydit plan` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.cli.app import main

FLUX = Path(__file__).parent.parent / "parity" / "flux_tiny_dev" / "checkpoint.pt"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(FLUX), "--axes-dims-rope", "4,6,6"]) == 0
    shown = capsys.readouterr()
    assert "482,768 + " in shown.out
    assert "2 + 2 blocks of 64 channels" in shown.out
    assert "at ratio 0.5" in shown.out
    assert "dydit convert --checkpoint" in shown.err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(FLUX), "--axes-dims-rope", "4,6,6", "--target-ratio", "0.8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "flux"
    assert found["params"]["static"] == 482_768
    assert found["gmacs"]["ratio"] == 0.8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(FLUX)], "axes_dims_rope"),
        ([str(FLUX), "--axes-dims-rope", "4,x"], "no list of numbers"),
        (["absent.safetensors"], "no checkpoint at"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_is_priced_before_anything_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["plan", "demo/fashion-mnist-dit", "steps=40", "batch_size=8", "evaluate_every=10", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["pace"]["how"] == "measured"
    assert found["pace"]["data"] is True
    assert found["pace"]["total_s"] > 40 * found["pace"]["step_s"]
    assert found["trainable_share"] == pytest.approx(
        found["parameters"]["trained"] / found["parameters"]["static"]
    )
    memory = found["memory_bytes"]
    assert memory["moments"] == 2 * memory["gradients"] == 8 * found["parameters"]["trained"]
    assert found["disk_bytes"]["kept"] == 3
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_published_size_is_priced_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "dit-s-2-256/full", "--no-measure"]) == 0
    shown = capsys.readouterr()
    assert (
        "12 blocks of 384 channels, from the published size dit-s/2, by the name DiT-S-2-256x256.pt"
        in shown.out
    )
    assert "not measured: measuring was not asked for" in shown.out
    assert "The data are not here" in shown.err


def test_recipe_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schema: 1\nfinetune:\n  model: absent\n  data: x\n  out: y\n  steps: 3\n")
    assert main(["plan", str(recipe)]) == 2
    assert "--preset" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--preset", "dit-xl/9"]) == 2
    assert "no preset called" in capsys.readouterr().err
    assert main(["plan", "steps=3"]) == 2
    assert "belongs to no recipe" in capsys.readouterr().err
