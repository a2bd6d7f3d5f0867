"""`dydit finetune --dry-run`: the recipe, one batch as a picture, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dydit_cli.cli.app import main
from dydit_cli.training.batch_picture import as_colours, write_batch_picture
from dydit_cli.training.rehearsal import Rehearsal
from tests.cli.test_finetune import words


def test_it_shows_and_leaves_a_picture_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = words(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr()
    recipe = yaml.safe_load(shown.out.split("\n\n")[0])
    assert recipe["finetune"]["target_ratio"] == 0.6
    assert recipe["finetune"]["weight_decay"] == 0.0, "defaults are filled in"
    assert "54 samples of 1 x 8 x 8, 6 held out" in shown.out
    assert "Nothing was trained" in shown.err
    assert {path.name for path in tmp_path.iterdir()} - before == {"t.dry-run.png"}
    with Image.open(tmp_path / "t.dry-run.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(tmp_path), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finetune"]["steps"] == 4
    assert found["picture"] == str(tmp_path / "t.dry-run.png")
    assert len(found["captions"]) == 8
    assert all(caption.startswith("class ") for caption in found["captions"])


def test_mistakes_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(tmp_path), "--dry-run", "label_dropout=2"]) == 2
    assert "must be less than 1" in capsys.readouterr().err
    arguments = words(tmp_path)
    arguments[arguments.index("--data") + 1] = str(tmp_path / "absent")
    assert main([*arguments, "--dry-run"]) == 2
    assert "There is no data" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def rehearsal(shape: tuple[int, ...], pixels: bool) -> Rehearsal:
    clean = torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    count = shape[0]
    return Rehearsal(
        "", 0, clean, clean.flip(0), ["a long caption " * 12] * count, [0.5] * count, pixels, {}, []
    )


@pytest.mark.parametrize(
    ("shape", "pixels"), [((5, 4, 8, 8), False), ((3, 6, 1, 8, 8), True), ((1, 16, 6, 10), False)]
)
def test_latents_and_videos_have_pictures_too(tmp_path: Path, shape: tuple[int, ...], pixels: bool) -> None:
    path = write_batch_picture(tmp_path / "x.png", rehearsal(shape, pixels))
    with Image.open(path) as picture:
        assert picture.width > 300


def test_a_video_is_a_strip_of_frames() -> None:
    video = torch.full((3, 1, 4, 4), -1.0)
    video[1] = 0.0
    strip = as_colours(video, pixels=True)
    assert strip.shape == (4, 3 * 4 + 2, 3)
    assert strip[0, 0, 0] == 0
    assert strip[0, 4, 0] == 1
    assert strip[0, 5, 0] == 0.5
