"""`--graphs` and `--token-capacity` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import save_model
from dydit_cli.cli.app import main
from tests.tiny import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "t"
    folder.mkdir()
    save_model(tiny_model("dit", in_channels=1), folder)
    return str(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "words", [["sample", "--out", "s"], ["profile"], ["bench", "--batch", "1", "--pairs", "1"]]
)
def test_graphs_without_cuda(words: list[str], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--model", model, "--device", "cpu", "--graphs"]) == 2
    assert "CUDA graphs need a CUDA device" in capsys.readouterr().err
    assert not Path("s").exists()


def test_a_capacity_changes_no_image(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", model, "--num-images", "2", "--steps", "2", "--device", "cpu", "--json"]
    assert main(["sample", *options, "--out", "a"]) == 0
    assert main(["sample", *options, "--out", "b", "--token-capacity", "0.8"]) == 0
    first, second = (json.loads(Path(f"{name}/manifest.json").read_text()) for name in "ab")
    assert first["settings"]["token_capacity"] is None
    assert second["settings"]["token_capacity"] == 0.8
    images = [Path(f"{name}/images").glob("*.png") for name in "ab"]
    assert [path.read_bytes() for path in sorted(images[0])] == [
        path.read_bytes() for path in sorted(images[1])
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--token-capacity", "0.8", "--execution", "static"], "does not go with static execution"),
        (["--token-capacity", "0.8", "--compile"], "Compiling does not go with a token capacity"),
        (["--token-capacity", "1.8"], "token_capacity"),
    ],
)
def test_mistakes(words: list[str], said: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--model", model, "--out", "s", "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("s").exists()
