"""A whole run: a model's folder in, a folder of images out, which says how they were made; or nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from dydit_cli.artifacts import read_manifest, save_model
from dydit_cli.errors import DyditError
from dydit_cli.sampling.run import sample
from dydit_cli.sampling.streaming import ArrayStream
from tests.sampling.test_decoding import save_vae
from tests.tiny import tiny_model

QUICK: dict[str, Any] = {"num_images": 5, "steps": 3, "batch_size": 2, "device": "cpu"}


def saved(folder: str | Path, family: str = "dit", **changes: Any) -> Path:
    Path(folder).mkdir()
    save_model(tiny_model(family, **changes), folder)
    return Path(folder)


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_pixels(own_folder: Path, family: str) -> None:
    report = sample(saved("model", family, in_channels=1), "out", **QUICK)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "grid.png",
        "images",
        "manifest.json",
        "samples.npz",
    ]
    assert report.kind == "images"
    assert report.images == 5
    assert 0 < report.trajectory_ratio < 1
    assert report.evaluations == 3
    assert report.images_per_second == pytest.approx(5 / report.seconds)
    with np.load("out/samples.npz") as archive:
        assert archive["arr_0"].shape == (5, 8, 8, 3)


def test_the_manifest_says_how(own_folder: Path) -> None:
    report = sample(
        saved("model", in_channels=3),
        "out",
        classes=[1, 2],
        keep_bias=float("inf"),
        recipe_yaml="schema: 1\n",
        **QUICK,
    )
    assert "Infinity" not in Path("out/manifest.json").read_text()
    manifest = read_manifest("out")
    settings = manifest["settings"]
    assert manifest["stage"] == "sample"
    assert manifest["seed"] == 0
    assert settings["classes"] == [1, 2]
    assert settings["sampler"] == "ddpm"
    assert settings["guidance"] == 1.5
    assert settings["keep_bias"] == "inf"
    assert "rounded to the nearest" in manifest["results"]["rounding"]
    assert manifest["results"]["trajectory_ratio"] == report.trajectory_ratio == 1
    assert Path("out/recipe.yaml").read_text() == "schema: 1\n"


def test_latents_are_saved_without_an_autoencoder(own_folder: Path) -> None:
    report = sample(saved("model"), "out", classes=[3, 4], **QUICK)
    assert report.kind == "latents"
    assert report.files == ["latents.safetensors"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["latents.safetensors", "manifest.json"]
    tensors = load_file("out/latents.safetensors")
    assert tensors["latents"].shape == (5, 4, 8, 8)
    assert tensors["labels"].tolist() == [3, 4, 3, 4, 3]


def test_latents_are_decoded_with_one(own_folder: Path) -> None:
    save_vae(own_folder / "vae")
    report = sample(saved("model"), "out", vae="vae", **QUICK)
    assert report.kind == "images"
    with np.load("out/samples.npz") as archive:
        assert archive["arr_0"].shape == (5, 16, 16, 3)
    assert read_manifest("out")["settings"]["scaling_factor"] == 0.5


def test_static_and_dynamic_start_from_the_same_noise(own_folder: Path) -> None:
    """With everything on they are the same images, so that a difference otherwise is the routers' work."""
    model = saved("model", "sit", in_channels=1)
    static = sample(model, "static", execution="static", **QUICK)
    sample(model, "complete", keep_bias=float("inf"), **QUICK)
    sample(model, "dynamic", **QUICK)
    assert static.trajectory_ratio == 1
    arrays = {
        name: np.load(f"{name}/samples.npz")["arr_0"].astype(int)
        for name in ("static", "complete", "dynamic")
    }
    assert np.abs(arrays["static"] - arrays["complete"]).max() <= 1
    assert np.abs(arrays["static"] - arrays["dynamic"]).max() > 1


class TestNothingHalfWritten:
    def test_full_disk(self, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = saved("model", in_channels=1)
        original = ArrayStream.write
        calls = []

        def write(stream: ArrayStream, rows: np.ndarray) -> None:
            calls.append(len(rows))
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(stream, rows)

        monkeypatch.setattr(ArrayStream, "write", write)
        with pytest.raises(DyditError, match="disk is full"):
            sample(model, "out", **QUICK)
        assert [path.name for path in own_folder.iterdir()] == ["model"]

    def test_an_existing_folder_is_kept(self, own_folder: Path) -> None:
        model = saved("model", in_channels=1)
        sample(model, "out", **QUICK)
        before = Path("out/manifest.json").read_bytes()
        with pytest.raises(DyditError, match="exists already"):
            sample(model, "out", **QUICK)
        assert Path("out/manifest.json").read_bytes() == before
        sample(model, "out", overwrite=True, seed=5, **QUICK)
        assert json.loads(Path("out/manifest.json").read_text())["seed"] == 5

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"classes": [10]}, "no class 10"),
            ({"sampler": "heun"}, "does not fit"),
            ({"vae": "nowhere"}, "no autoencoder"),
            ({"device": "cuda:77"}, "is not there"),
            ({"device": "toaster"}, "not a device"),
            ({"dtype": "float8"}, "'float8'"),
            ({"execution": "fast"}, "no execution called 'fast'"),
            ({"model": "nowhere"}, "no model"),
        ],
    )
    def test_mistakes_leave_nothing(self, own_folder: Path, settings: dict[str, Any], what: str) -> None:
        model = saved("model")
        with pytest.raises(DyditError) as error:
            sample(**({"model": model, "out": "out"} | QUICK | settings))
        assert what in error.value.what
        assert not Path("out").exists()
