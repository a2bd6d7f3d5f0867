"""The files: PNG, grid, ADM archive and latents; written piece by piece, whole or not at all."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dydit_cli.data.latents import read_safetensors
from dydit_cli.sampling.decoding import to_uint8
from dydit_cli.sampling.streaming import npz_stream
from dydit_cli.sampling.writing import SampleWriter, image_grid
from tests.tiny import tiny_model

LABELS = [0, 1, 2, 0, 1]


def write(folder: Path, samples: torch.Tensor, batch: int = 2) -> SampleWriter:
    with SampleWriter(folder, len(samples), LABELS[: len(samples)]) as writer:
        for first in range(0, len(samples), batch):
            writer.write(samples[first : first + batch])
    return writer


class TestBytes:
    def test_rounding(self) -> None:
        values = torch.tensor([-2.0, -1.0, 0.0, 0.5 / 127.5 - 1, 0.51 / 127.5 - 1, 1.0, 7.0])
        expected = torch.tensor([0, 0, 128, 0, 1, 255, 255], dtype=torch.uint8)
        assert torch.equal(to_uint8(values.view(1, 1, 1, -1)).flatten(), expected)

    def test_every_byte_survives(self) -> None:
        every = torch.arange(256).float()
        assert torch.equal(to_uint8((every / 127.5 - 1).view(1, 1, 16, 16)).flatten().float(), every)

    def test_channels_last(self) -> None:
        assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


class TestImages:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_png_npz_and_grid_agree(self, own_folder: Path, channels: int) -> None:
        samples = torch.rand(5, channels, 6, 8, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
        writer = write(own_folder, samples)
        with np.load(own_folder / "samples.npz") as archive:
            assert archive.files == ["arr_0"]
            array = archive["arr_0"]
        assert array.dtype == np.uint8
        assert array.shape == (5, 6, 8, 3)
        assert np.array_equal(array, np.broadcast_to(to_uint8(samples).numpy(), array.shape))
        names = sorted(path.name for path in (own_folder / "images").iterdir())
        assert names == [f"{index:06d}.png" for index in range(5)]
        for index, name in enumerate(names):
            with Image.open(own_folder / "images" / name) as image:
                assert image.mode == ("L" if channels == 1 else "RGB")
                assert np.array_equal(np.asarray(image.convert("RGB")), array[index])
        with Image.open(own_folder / "grid.png") as grid:
            assert grid.size == (3 * (8 + 2) + 2, 2 * (6 + 2) + 2)
            assert np.array_equal(np.asarray(grid.convert("RGB"))[2:8, 2:10], array[0])
        assert writer.files == ["images/", "grid.png", "samples.npz"]

    def test_the_grid_holds_no_more_than_64(self, own_folder: Path) -> None:
        with SampleWriter(own_folder, 70, [0] * 70) as writer:
            writer.write(torch.zeros(70, 1, 4, 4))
        with Image.open(own_folder / "grid.png") as grid:
            assert grid.size == (8 * 6 + 2, 8 * 6 + 2)

    def test_grid_layout(self) -> None:
        images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
        grid = image_grid(images, columns=2, padding=1)
        assert grid.shape == (3 * 3 + 1, 2 * 4 + 1, 1)
        assert [
            int(grid[1 + 3 * row, 1 + 4 * column, 0]) for row, column in ((0, 0), (0, 1), (1, 0), (2, 0))
        ] == [0, 1, 2, 4]
        assert (grid[7:9, 5:8] == 255).all()
        assert (grid[0] == 255).all()

    def test_the_archive_depends_on_its_content_alone(self, own_folder: Path) -> None:
        (own_folder / "a").mkdir()
        (own_folder / "b").mkdir()
        samples = torch.rand(4, 1, 4, 4)
        write(own_folder / "a", samples, batch=1)
        write(own_folder / "b", samples, batch=3)
        assert (own_folder / "a/samples.npz").read_bytes() == (own_folder / "b/samples.npz").read_bytes()


class TestLatents:
    def test_they_are_read_back_at_the_models_scale(self, own_folder: Path) -> None:
        samples = torch.randn(5, 4, 8, 8)
        writer = write(own_folder, samples)
        assert writer.files == ["latents.safetensors"]
        assert [path.name for path in own_folder.iterdir()] == ["latents.safetensors"]
        with safe_open(own_folder / "latents.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor("latents"), samples)
            assert file.get_tensor("labels").tolist() == LABELS
        latents = read_safetensors(own_folder / "latents.safetensors", tiny_model("dit").geometry)
        latent, label = latents.sample(3)
        assert torch.equal(latent, samples[3])
        assert label == LABELS[3]


class TestStreaming:
    def test_memory_does_not_grow_with_the_number_of_images(self, own_folder: Path) -> None:
        rows = np.zeros((16, 64, 64, 3), np.uint8)
        tracemalloc.start()
        with npz_stream(own_folder / "many.npz", (16 * 200, 64, 64, 3), np.dtype(np.uint8)) as stream:
            for _ in range(200):
                stream.write(rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = (own_folder / "many.npz").stat().st_size
        assert size > 200 * rows.nbytes
        assert peak < size / 20

    def test_more_than_4_gb_are_foreseen(self, own_folder: Path) -> None:
        """The sizes of an entry must be 64-bit from its start; they cannot be widened once the numbers follow."""
        with npz_stream(own_folder / "a.npz", (1, 2), np.dtype(np.uint8)) as stream:
            stream.write(np.zeros((1, 2), np.uint8))
        with zipfile.ZipFile(own_folder / "a.npz") as archive:
            (entry,) = archive.infolist()
            assert entry.compress_type == zipfile.ZIP_STORED
        start = (own_folder / "a.npz").read_bytes()[:64]
        assert start[18:26] == b"\xff" * 8

    @pytest.mark.parametrize("rows", [np.zeros((1, 3), np.uint8), np.zeros((3, 2), np.uint8)])
    def test_rows_that_do_not_fit_are_refused(self, own_folder: Path, rows: np.ndarray) -> None:
        with (
            pytest.raises(ValueError, match="do not fit"),
            npz_stream(own_folder / "a.npz", (2, 2), np.dtype(np.uint8)) as stream,
        ):
            stream.write(rows)

    def test_missing_rows_are_noticed(self, own_folder: Path) -> None:
        with (
            pytest.raises(ValueError, match="1 of 2 rows"),
            npz_stream(own_folder / "a.npz", (2, 2), np.dtype(np.uint8)) as stream,
        ):
            stream.write(np.zeros((1, 2), np.uint8))
