"""`dydit sample` as a person types it: what it prints where, what it writes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dydit_cli.artifacts import save_model
from dydit_cli.cli.app import main
from tests.tiny import tiny_model


@pytest.fixture
def pixel_model(tmp_path: Path) -> Path:
    """A saved tiny dynamic DiT with one channel."""
    folder = tmp_path / "t"
    folder.mkdir()
    save_model(tiny_model("dit", in_channels=1), folder)
    return folder


@pytest.fixture
def latent_model(tmp_path: Path) -> Path:
    """A saved tiny dynamic SiT with four channels."""
    folder = tmp_path / "latent model"
    folder.mkdir()
    save_model(tiny_model("sit"), folder)
    return folder


def words(model: Path, *more: str) -> list[str]:
    options = ["--classes", "0,1", "--num-images", "3", "--steps", "2", "--device", "cpu"]
    return ["sample", "--model", str(model), *options, "--out", "s", *more]


def test_images_from_plain_options(pixel_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(pixel_model, "--guidance", "4", "--execution", "compact", "--seed", "3")) == 0
    captured = capsys.readouterr()
    assert sorted(path.name for path in Path("s").iterdir()) == [
        "grid.png",
        "images",
        "manifest.json",
        "recipe.yaml",
        "samples.npz",
    ]
    for expected in (
        "ddpm, 2 steps, guidance 4",
        "images/s",
        "trajectory ratio",
        "cpu",
        "torch",
        "Written to s",
    ):
        assert expected in captured.out
    assert f"next: dydit export --model {pixel_model}" in captured.err
    with np.load("s/samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 8, 8, 3)


def test_json_alone_on_stdout(pixel_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(pixel_model, "--json", "--execution", "static", "--sampler", "ddim")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trajectory_ratio"] == 1
    assert report["images"] == 3
    assert report["sampler"] == "ddim"
    assert report["execution"] == "static"


def test_the_kept_recipe_makes_the_same_images(pixel_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(pixel_model)) == 0
    assert main(["sample", "s/recipe.yaml", "out=again"]) == 0
    assert Path("s/samples.npz").read_bytes() == Path("again/samples.npz").read_bytes()


def test_latents_are_announced(latent_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(latent_model, "--sampler", "heun")) == 0
    captured = capsys.readouterr()
    assert "warning: the model makes latents, and no --vae was given" in captured.err
    assert f"next: dydit sample --model '{latent_model}' --vae" in captured.err
    assert Path("s/latents.safetensors").is_file()


def test_an_adaptive_sampler_says_so(latent_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(latent_model, "--sampler", "dopri5", "--execution", "static", "--guidance", "1")) == 0
    assert "dopri5, steps of its own choice" in capsys.readouterr().out


def test_infinite_keep_bias_is_the_complete_model(
    pixel_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(pixel_model, "--keep-bias", "inf", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["trajectory_ratio"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--classes", "0,10"), "no class 10"),
        (("--classes", "-1"), "sample.classes"),
        (("--sampler", "euler"), "ddpm, ddim, dpm++"),
        (("--sampler", "ddmp"), "did you mean 'ddpm'"),
        (("--steps", "0"), "sample.steps"),
        (("--steps", "1001"), "1001 steps are too many"),
        (("--num-images", "0"), "sample.num_images"),
        (("--guidance", "-1"), "sample.guidance"),
        (("--execution", "fast"), "sample.execution"),
        (("--vae", "nowhere"), "needs no autoencoder"),
        (("--device", "cuda:77"), "'cuda:77' is not there"),
        (("--model", "nowhere"), "no model at nowhere"),
        (("stepz=3",), "steps"),
    ],
)
def test_mistakes_have_three_parts_and_leave_nothing(
    pixel_model: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    assert main(words(pixel_model, *options)) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "  why: " in captured.err
    assert "  fix: " in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not Path("s").exists()


def test_a_missing_autoencoder(latent_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(latent_model, "--vae", "nowhere")) == 2
    assert "There is no autoencoder at nowhere" in capsys.readouterr().err
    assert not Path("s").exists()


def test_an_existing_folder_is_kept(pixel_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(pixel_model)) == 0
    assert main(words(pixel_model)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(words(pixel_model, "--overwrite")) == 0
