"""`dydit convert` as a newcomer meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.cli import console
from dydit_cli.cli.app import main

PARITY = Path(__file__).parent.parent / "parity"
STATIC = str(PARITY / "dit_tiny" / "checkpoint.pt")


def test_it_says_what_it_did_that_nothing_is_faster_yet_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--checkpoint", "builtin:sit_fmnist", "--out", str(tmp_path / "c")]) == 0
    captured = capsys.readouterr()
    assert "Largest difference from the source: 0.0e+00 in weights, 0.0e+00 dense" in captured.out
    assert "not faster yet" in captured.err
    assert f"next: dydit finetune demo/fashion-mnist-sit --model {tmp_path / 'c'}" in captured.err


def test_json_goes_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["convert", "--checkpoint", "builtin:dit_fmnist", "--out", str(tmp_path / "c"), "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "dit"
    assert report["params"]["routers"] == 17082
    assert report["static_gmacs"] == pytest.approx(0.08328, abs=1e-5)


def test_at_a_terminal_it_asks_for_what_the_file_cannot_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(question: str, choices: list[str]) -> str:
        asked.append(question)
        return "sit" if "sit" in choices else "6"

    monkeypatch.setattr(console, "can_ask", lambda: True)
    monkeypatch.setattr(console, "ask", answer)
    assert main(["convert", "--checkpoint", STATIC, "--out", str(tmp_path / "c"), "--json"]) == 0
    assert len(asked) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["geometry"]["num_heads"]) == ("sit", 6)


def test_elsewhere_it_names_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--checkpoint", STATIC, "--out", str(tmp_path / "c")]) == 2
    assert "--family dit" in capsys.readouterr().err
    assert main(["convert", "--checkpoint", STATIC, "--family", "dit", "--out", str(tmp_path / "c")]) == 2
    assert "--num-heads" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_the_authors_dynamic_file_goes_straight_to_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(PARITY / "dydit_official_tiny" / "checkpoint.pt")
    arguments = ["convert", "--checkpoint", checkpoint, "--num-heads", "6", "--out", str(tmp_path / "c")]
    assert main(arguments) == 0
    messages = capsys.readouterr().err
    assert "trained routers were kept" in messages
    assert f"next: dydit profile --model {tmp_path / 'c'}" in messages


def test_a_recipe_converts_with_changes(tmp_path: Path) -> None:
    out = tmp_path / "c"
    assert (
        main(["convert", "demo/fashion-mnist-dit", f"out={out}", "grouping=contiguous", "--seed", "3"]) == 0
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["settings"]["grouping"], manifest["settings"]["seed"]) == ("contiguous", 3)
    assert "fashion-mnist-dit" in (out / "recipe.yaml").read_text()
