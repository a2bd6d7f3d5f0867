"""The pictures: they are there, they show the numbers, and matplotlib's global state stays out of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dydit_cli.objectives import objective_for
from dydit_cli.profiling.plots import block_figure, token_figure, write_plots
from dydit_cli.profiling.shares import BlockShares
from dydit_cli.profiling.token_maps import token_maps
from tests.profiling.sources import RandomSource
from tests.tiny import tiny_model

SHARES = BlockShares(
    t=[100.0, 500.0, 900.0],
    noise_level=[0.3, 0.9, 1.0],
    heads=[[1.0, 0.9], [0.5, 0.4], [0.2, 0.1]],
    groups=[[1.0, 1.0]] * 3,
    tokens=[[0.0, 0.5]] * 3,
)


@pytest.fixture(scope="module")
def maps():
    model = tiny_model()
    return token_maps(model, RandomSource(model.geometry, 12), objective_for(model.family))


def test_the_files(maps, own_folder: Path) -> None:
    names = write_plots(own_folder, SHARES, maps, "a model")
    assert names == ["heads.png", "groups.png", "tokens.png", "token_maps.png"]
    for name in names:
        with Image.open(own_folder / name) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
            assert sum(count > 0 for count in image.convert("L").histogram()) > 20
    assert write_plots(own_folder, SHARES, None, "a model") == names[:3]


def test_the_noisiest_level_is_on_the_left_and_colours_run_from_0_to_1() -> None:
    main = block_figure("heads", SHARES, "a model").axes[0]
    (image,) = main.images
    assert np.allclose(image.get_array(), [[0.2, 0.5, 1.0], [0.1, 0.4, 0.9]])
    assert image.get_clim() == (0, 1)
    assert [label.get_text().split("\n")[0] for label in main.get_xticklabels()] == ["900", "500", "100"]


def test_token_maps_are_those_of_the_routers(maps) -> None:
    model = tiny_model()
    source = RandomSource(model.geometry, 12)
    assert maps.kept.shape == (3, 6, 4, 4)
    assert maps.noised.shape == (3, 6, 4, 8, 8)
    assert maps.noise_level.tolist() == sorted(maps.noise_level.tolist(), reverse=True)
    labels = source.labels[:3]
    times = torch.full((3,), float(maps.t[2]))
    routing = model.routing(times, maps.noised[:, 2], labels)
    assert torch.allclose(maps.kept[:, 2].flatten(1), routing.tokens.mean(dim=1))
    assert 0 < float(maps.kept.mean()) < 1


def test_the_token_figure_shows_every_map(maps) -> None:
    figure = token_figure(maps, "a model")
    shown = [image.get_array() for axes in figure.axes for image in axes.images]
    kept = [array for array in shown if array.shape == (4, 4)]
    assert len(kept) == 18
    assert np.allclose(kept[0], maps.kept[0, 0])


@pytest.mark.parametrize("samples", [1, 2])
def test_few_samples_give_few_rows(samples: int) -> None:
    model = tiny_model()
    few = token_maps(model, RandomSource(model.geometry, samples), objective_for(model.family))
    assert few.kept.shape[0] == samples
    assert token_figure(few, "a model").axes


def test_neither_pyplot_nor_a_window_system_is_touched(repository: Path) -> None:
    code = """
import sys
import dydit_cli.profiling.plots as plots
assert "matplotlib" not in sys.modules
plots._figure(1, 1)
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)
