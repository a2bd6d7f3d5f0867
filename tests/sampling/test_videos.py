"""Sampling of videos: the channel axis is the third from the end, in guidance and in every sampler."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.artifacts import save_model
from dydit_cli.errors import DyditError
from dydit_cli.sampling.generate import generate
from dydit_cli.sampling.guidance import Guidance, GuidedField
from dydit_cli.sampling.run import sample
from tests.families.test_latte import load_case
from tests.sampling.models import PARITY
from tests.tiny import tiny_model

GREY = {"in_channels": 1}


def test_guidance_as_in_the_original() -> None:
    """Scale 7 on the first four channels of axis 2, by the call that samplers make."""
    model, case = load_case("latte_tiny_class")
    half = len(case["cfg_x"]) // 2
    field = GuidedField(model, case["cfg_y"][:half], Guidance(7.0))
    output = field(case["cfg_x"][:half], case["cfg_t"][:half])
    assert output.shape == case["cfg_out_scale7"][:half].shape
    assert float((output - case["cfg_out_scale7"][:half]).abs().max()) < 1e-4
    assert (PARITY / "latte_tiny_class" / "io.safetensors").exists()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_samplers_make_videos(sampler: str, learn_sigma: bool) -> None:
    """Whatever the batch; with as many frames as twice the channels nothing is mistaken for a variance."""
    model = tiny_model("latte", num_frames=8, learn_sigma=learn_sigma).set_execution("compact")
    settings = {"num_images": 2, "steps": 3, "sampler": sampler, "seed": 3}
    together = torch.cat([batch.samples for batch in generate(model, batch_size=2, **settings)])
    alone = torch.cat([batch.samples for batch in generate(model, batch_size=1, **settings)])
    assert together.shape == (2, 8, 4, 8, 8)
    assert float((together - alone).abs().max()) < 1e-4 * float(together.abs().max())


def test_frames_are_images_to_the_sampler() -> None:
    """A DDPM step is elementwise: frames of a video that a field treats alike move alike under the same noise."""
    from dydit_cli.sampling.diffusion import ddpm
    from tests.sampling.models import FunctionField

    class NoNoise:
        def generators(self, step: int) -> list[torch.Generator]:
            return [torch.Generator().manual_seed(step)]

        def step(self, step: int) -> torch.Tensor:
            raise AssertionError

    def prediction(state: torch.Tensor, time: torch.Tensor, frozen: float | None) -> torch.Tensor:
        return torch.cat([0.1 * state, 0.2 * torch.tanh(state)], dim=-3)

    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = list(ddpm(FunctionField(prediction, learned_sigma=True), start, 4, NoNoise()))
    videos = list(ddpm(FunctionField(prediction, learned_sigma=True), start[:, None], 4, NoNoise()))
    for image, video in zip(images, videos, strict=True):
        assert torch.equal(image, video[:, 0])


def test_an_unconditional_model_runs_one_branch() -> None:
    model = tiny_model("latte", num_classes=0).set_execution("compact")
    (batch,) = generate(model, num_images=2, steps=2, guidance=4.0)
    (plain,) = generate(model, num_images=2, steps=2, guidance=1.0)
    assert torch.equal(batch.samples, plain.samples)
    assert batch.labels == (0, 0)
    with pytest.raises(DyditError, match="no classes"):
        generate(model, classes=[1], steps=2)


def test_a_run_writes_videos(tmp_path: Path) -> None:
    save_model(tiny_model("latte", **GREY), tmp_path / "model")
    report = sample(
        tmp_path / "model", tmp_path / "out", num_images=3, steps=2, video_formats=("gif", "frames", "grid")
    )
    assert report.kind == "videos"
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 2, 8, 8, 3)
    assert (tmp_path / "out" / "videos" / "000002.gif").is_file()
    assert len(list((tmp_path / "out" / "frames" / "000001").glob("*.png"))) == 2
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]["kind"] == "videos"


def test_latents_of_videos_are_written_as_they_are(tmp_path: Path) -> None:
    save_model(tiny_model("latte"), tmp_path / "model")
    report = sample(tmp_path / "model", tmp_path / "out", num_images=2, steps=2)
    assert report.kind == "latents"
    (latents,) = [name for name in report.files if name.endswith(".safetensors")]
    assert load_file(tmp_path / "out" / latents)["latents"].shape == (2, 2, 4, 8, 8)
