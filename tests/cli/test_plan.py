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
