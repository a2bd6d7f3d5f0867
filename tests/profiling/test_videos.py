"""Profiles of video models: frames in the token maps, and inputs that fit."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dydit_cli.objectives import objective_for
from dydit_cli.profiling.inputs import NoiseSource, find_inputs
from dydit_cli.profiling.plots import write_plots
from dydit_cli.profiling.token_maps import token_maps
from tests.profiling.test_plots import SHARES
from tests.tiny import tiny_model


def test_token_maps_show_frames_of_one_video(own_folder: Path) -> None:
    model = tiny_model("latte", num_frames=5)
    source = NoiseSource(model.geometry, 4, 0)
    maps = token_maps(model, source, objective_for("latte"))
    assert maps.frames == (0, 2, 4)
    assert maps.clean.shape == (3, 4, 8, 8)
    assert maps.noised.shape == (3, 6, 4, 8, 8)
    assert maps.kept.shape == (3, 6, 4, 4)
    video = source.batch([0])
    assert torch.equal(maps.clean, video[0, [0, 2, 4]])
    assert "token_maps.png" in write_plots(own_folder, SHARES, maps, "a model")
    with Image.open(own_folder / "token_maps.png") as image:
        assert min(image.size) > 300


def test_tokens_of_a_frame_are_its_own() -> None:
    """The map of frame f holds the decisions of tokens f * N to (f + 1) * N."""
    model = tiny_model("latte", num_frames=3)
    source, objective = NoiseSource(model.geometry, 2, 0), objective_for("latte")
    maps = token_maps(model, source, objective, seed=3)
    from dydit_cli.randomness import normal

    noise = normal(3, tuple(source.batch([0]).shape[1:]), "token_maps", 0)[None]
    t = maps.t[-1:]
    noisy = objective.noised(source.batch([0]), noise, t)
    tokens = model.routing(t, noisy, source.labels[:1]).tokens.mean(dim=1)
    assert torch.allclose(maps.kept[1, -1].flatten(), tokens[0, 16:32])


def test_packaged_videos_fit_a_small_grey_model() -> None:
    model = tiny_model("latte", in_channels=1, sample_size=32, patch_size=8, num_frames=4)
    found = find_inputs(model.geometry, None, None, 4, 0)
    assert found.real
    assert found.data == "moving-fashion-mnist"
    assert found.source.batch([0]).shape == (1, 4, 1, 32, 32)
