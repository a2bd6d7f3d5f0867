"""`dydit export` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.cli.app import main
from tests.export.artifacts import trained


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return trained(tmp_path / "t", in_channels=1)


@pytest.mark.parametrize(
    ("kind", "file", "verdict"),
    [
        ("diffusers", "transformer/modeling_dydit.py", "differs from the model by at most 0.0e+00"),
        ("original", "model.pt", "every tensor is bit for bit what was meant"),
        ("static", "model.pt", "every tensor is bit for bit what was meant"),
    ],
)
def test_plain_options(
    kind: str, file: str, verdict: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", str(model), "--format", kind, "--out", "e"]) == 0
    captured = capsys.readouterr()
    assert file in captured.out
    assert verdict in captured.out
    assert "reading the model" in captured.err
    assert "README.md" in captured.err
    assert (Path("e") / file).is_file()
    assert (Path("e") / "recipe.yaml").is_file()


def test_json_is_all_that_stdout_gets(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", str(model), "--out", "e", "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["dtype"], report["family"]) == ("diffusers", "bfloat16", "dit")
    assert report["max_difference"] == 0
    assert report["sha256"].keys() <= report["files"].keys()


def test_a_latent_model_is_told_about_its_autoencoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(tmp_path / "latent")
    assert main(["export", "--model", str(model), "--out", "e"]) == 0
    assert "--vae DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format", "difusers"], "diffusers"),
        (["--dtype", "float8"], "dtype"),
        (["max_shard_size=lots"], "shard size"),
        (["--vae", "nowhere"], "There is no autoencoder at nowhere"),
    ],
)
def test_mistakes(words: list[str], expected: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", str(model), "--out", "e", *words]) == 2
    stderr = capsys.readouterr().err
    assert expected in stderr
    assert "  why: " in stderr
    assert "  fix: " in stderr
    assert "Traceback" not in stderr
    assert not Path("e").exists()


def test_what_is_no_artifact_and_what_exists(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", "nowhere", "--out", "e"]) == 2
    assert "There is no model at nowhere" in capsys.readouterr().err
    command = ["export", "--model", str(model), "--format", "static", "--out", "e"]
    assert main(command) == 0
    assert main(command) == 2
    assert "e exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
