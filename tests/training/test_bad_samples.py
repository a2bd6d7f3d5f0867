"""Corrupt images and vanished data while training: a clear error that loses nothing, or a counted skip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dydit_cli.cli.app import main
from dydit_cli.data import TrainingBatches, open_data
from dydit_cli.data.bad_samples import BadSample, BadSamples
from dydit_cli.data.mirror import MirrorRule
from dydit_cli.errors import DyditError
from dydit_cli.training import checkpoint, prepare
from tests.training.runs import metrics_of, settings_for
from tests.training.test_finetuning import run, tensors_of


def write_images(folder: Path, count: int = 120) -> Path:
    """Noise of three classes as PNG files."""
    random = np.random.default_rng(0)
    for index in range(count):
        place = folder / "images" / f"class{index % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / f"{index:03d}.png")
    return folder / "images"


def first_of(folder: Path, steps: range = range(1), batch_size: int = 8) -> Path:
    """The file of the first sample of a step's batch."""
    geometry = prepare(settings_for(folder, data=str(folder / "images"))).model.geometry
    data = open_data(folder / "images", geometry=geometry)
    batches = TrainingBatches(data.train, batch_size, 0, MirrorRule(False))
    return folder / "images" / data.train.key(batches.at(steps[0]).samples[0])


def test_a_corrupt_image_names_its_file_and_loses_no_step(tmp_path: Path) -> None:
    data = write_images(tmp_path)
    settings = settings_for(tmp_path, data=str(data), checkpoint_every=0, num_workers=1)
    bad = first_of(tmp_path, range(3, 4))
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    with pytest.raises(DyditError, match="cannot be read") as caught:
        run(settings)
    assert str(bad) in caught.value.what
    assert "--resume" in caught.value.fix
    assert [entry.step for entry in checkpoint.checkpoints(tmp_path / "t")] == [3]
    bad.write_bytes(whole)
    run(settings.model_copy(update={"resume": True}))
    straight = tmp_path / "straight"
    straight.mkdir()
    run(settings_for(straight, data=str(data), checkpoint_every=0))
    assert metrics_of(straight / "t") == metrics_of(tmp_path / "t")


def test_skipping_is_counted_told_and_the_same_after_a_resume(tmp_path: Path) -> None:
    data = write_images(tmp_path)
    bad = first_of(tmp_path, range(1, 2))
    bad.write_bytes(b"not an image")
    folders = [tmp_path / name for name in ("straight", "stopped")]
    for folder in folders:
        folder.mkdir()
    told = []
    common = {"data": str(data), "on_bad_sample": "skip", "checkpoint_every": 3}
    straight = prepare(settings_for(folders[0], **common))
    for report in straight.steps():
        told += report.notes
    straight.finish()
    assert len(told) == 1
    assert str(bad) in told[0]
    run(settings_for(folders[1], **common), stop_after=3)
    run(settings_for(folders[1], **common, num_workers=2, resume=True))
    assert metrics_of(folders[0] / "t") == metrics_of(folders[1] / "t")
    assert [line["bad_samples"] for line in metrics_of(folders[0] / "t")] == [0, 1, 1, 1, 1, 1]
    first, second = (tensors_of(folder / "t") for folder in folders)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    manifest = json.loads((folders[1] / "t" / "manifest.json").read_text())
    assert list(manifest["results"]["data"]["bad_samples"]) == [bad.relative_to(data).as_posix()]


def test_a_bad_held_out_image_is_left_out(tmp_path: Path) -> None:
    data = write_images(tmp_path)
    split = prepare(settings_for(tmp_path, data=str(data))).data
    bad = data / split.held_out.key(0)
    bad.write_bytes(b"")
    started = prepare(settings_for(tmp_path, data=str(data), on_bad_sample="skip"))
    assert len(started.data.held_out) == len(split.held_out) - 1
    assert str(bad) in started.warnings[0]


@pytest.mark.parametrize("answer", ["error", "skip"])
def test_a_vanished_folder_is_an_error_either_way(tmp_path: Path, answer: str) -> None:
    data = write_images(tmp_path)
    started = prepare(settings_for(tmp_path, data=str(data), on_bad_sample=answer, evaluate_every=0))
    with pytest.raises(DyditError) as caught:
        for report in started.steps():
            if report.step == 2:
                shutil.rmtree(data)
    assert "cannot be read" in caught.value.what
    assert "No such file" in caught.value.why
    assert "The 2 steps until now are kept" in caught.value.fix


def test_a_vanished_file_of_latents_is_an_error(tmp_path: Path) -> None:
    from dydit_cli.data.latents import _SafetensorsRows

    save_file({"latents": torch.zeros(3, 4, 2, 2)}, tmp_path / "x.safetensors")
    rows = _SafetensorsRows(tmp_path / "x.safetensors", "latents", (3, 4, 2, 2))
    assert rows.read([1]).shape == (1, 4, 2, 2)
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(DyditError, match="can no longer be read"):
        rows.read([1])


def test_too_many_bad_samples_are_an_error() -> None:
    found = BadSamples(300)
    for index in range(3):
        assert "bad so far" in found.see([BadSample(f"{index}.png", "x")])[0]
        assert found.see([BadSample(f"{index}.png", "x")]) == ()
    with pytest.raises(DyditError, match=r"4 of 300 samples cannot be read, such as 1.png, 2.png, 3.png"):
        found.see([BadSample("3.png", "x")])
    assert BadSamples(20).limit == 1


def test_the_command_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path)
    first_of(tmp_path).write_bytes(b"not an image")
    words = [
        f"model={tmp_path / 'c-dit'}",
        f"data={data}",
        f"out={tmp_path / 't'}",
        "steps=1",
        "batch_size=8",
    ]
    assert main(["finetune", *words, "device=cpu"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    assert main(["finetune", *words, "device=cpu", "calibrate=false", "on_bad_sample=skip"]) == 0
    assert "Another sample takes its place (1 bad so far)" in capsys.readouterr().err
