"""A run of a video model leaves videos, and says so; what it draws is the samplers' matter and tested there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.artifacts import read_manifest, save_model
from dydit_cli.data import open_data
from dydit_cli.errors import DyditError
from dydit_cli.sampling import run
from dydit_cli.sampling.generate import Batch
from dydit_cli.sampling.run import sample
from tests.tiny import tiny_model


def saved(folder: str, **changes: Any) -> Path:
    Path(folder).mkdir()
    save_model(tiny_model("latte", **changes), folder)
    return Path(folder)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Three videos of four latent channels, of which a model gets as many as it has, instead of a sampler's work."""
    videos = torch.rand(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def batches(model: Any, **settings: Any) -> Iterator[Batch]:
        mine = videos[:, :, : model.geometry.in_channels]
        yield Batch((0, 1), (0, 1), mine[:2], torch.full((2,), 0.5), 3)
        yield Batch((2,), (2,), mine[2:], torch.full((1,), 0.5), 3)

    monkeypatch.setattr(run, "generate", batches)
    return videos


QUICK: dict[str, Any] = {"num_images": 3, "steps": 3, "batch_size": 2, "device": "cpu"}


def test_pixels_become_videos(own_folder: Path, drawn: torch.Tensor) -> None:
    report = sample(saved("model", in_channels=3), "out", **QUICK, video_formats=["gif", "grid"], fps=5)
    assert report.kind == "videos"
    assert report.files == ["videos/", "grid.gif", "grid.png", "samples.npz"]
    assert sorted(path.name for path in Path("out/videos").iterdir()) == [f"00000{k}.gif" for k in range(3)]
    with np.load("out/samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 2, 8, 8, 3)
    manifest = read_manifest("out")
    assert manifest["settings"]["video_formats"] == ["gif", "grid"]
    assert manifest["settings"]["fps"] == 5
    assert manifest["results"]["rounding"] is not None


def test_latents_stay_latents_that_train(own_folder: Path, drawn: torch.Tensor) -> None:
    model = saved("model")
    report = sample(model, "out", **QUICK)
    assert report.kind == "latents"
    assert report.files == ["latents.safetensors"]
    assert "fps" not in read_manifest("out")["settings"]
    assert torch.equal(load_file("out/latents.safetensors")["latents"], drawn)
    split = open_data("out/latents.safetensors", geometry=tiny_model("latte").geometry)
    assert split.train.sample(0)[0].shape == (2, 4, 8, 8)


def test_formats_are_checked_before_the_weights_are_read(own_folder: Path) -> None:
    model = saved("model", in_channels=3)
    (model / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DyditError, match="'mp3' is not a format"):
        sample(model, "out", **QUICK, video_formats=["mp3"])
    assert not Path("out").exists()
