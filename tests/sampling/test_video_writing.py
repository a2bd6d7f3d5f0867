"""The files of a video run, read back with PyAV and Pillow."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from dydit_cli.data import open_data
from dydit_cli.errors import DyditError
from dydit_cli.recipe.schema import SampleSection
from dydit_cli.sampling import video_files
from dydit_cli.sampling.decoding import VaeDecoder
from dydit_cli.sampling.video_writing import (
    DEFAULT_FORMATS,
    DEFAULT_FPS,
    FORMATS,
    VideoWriter,
    as_bytes,
    frame_sheet,
    picture_of,
    playing_grid,
)
from tests.data.videos import VideoShape, drifting


def videos(count: int = 3, frames: int = 8, channels: int = 3, side: int = 32) -> torch.Tensor:
    """Smooth pictures that move, in [-1, 1]: what an encoder can keep."""
    stacked = torch.stack([drifting(frames, side, offset=5 * k) for k in range(count)])
    return (stacked[:, :, :channels].float() / 127.5) - 1


def write(folder: Path, samples: torch.Tensor, batch: int = 2, **options: object) -> VideoWriter:
    with VideoWriter(folder, len(samples), **options) as writer:  # type: ignore[arg-type]
        for first in range(0, len(samples), batch):
            writer.write(samples[first : first + batch])
    return writer


def mp4_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def gif_frames(path: Path) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as image:
        pairs = [
            (np.array(frame.convert("RGB")), frame.info["duration"])
            for frame in ImageSequence.Iterator(image)
        ]
    return np.stack([pixels for pixels, _ in pairs]), [duration for _, duration in pairs]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_file_shows_the_samples(own_folder: Path, channels: int) -> None:
    samples = videos(channels=channels)
    writer = write(own_folder, samples, formats=["mp4", "gif", "frames", "grid"])
    assert writer.files == ["videos/", "frames/", "grid.gif", "grid.png", "samples.npz"]
    assert sorted(path.name for path in own_folder.iterdir()) == [
        "frames",
        "grid.gif",
        "grid.png",
        "samples.npz",
        "videos",
    ]
    with np.load("samples.npz") as archive:
        array = archive["arr_0"]
    assert array.dtype == np.uint8
    assert array.shape == (3, 8, 32, 32, 3)
    assert np.array_equal(array, np.broadcast_to(as_bytes(samples), array.shape))
    for k in range(3):
        frames = sorted(Path(f"frames/{k:06d}").iterdir())
        assert [path.name for path in frames] == [f"{index:03d}.png" for index in range(8)]
        for index, path in enumerate(frames):
            with Image.open(path) as image:
                assert image.mode == ("L" if channels == 1 else "RGB")
                assert np.array_equal(np.asarray(image.convert("RGB")), array[k, index])
        played, durations = gif_frames(Path(f"videos/{k:06d}.gif"))
        assert durations == [120] * 8
        error = np.abs(played.astype(int) - array[k])
        if channels == 1:
            assert error.max() == 0, "a GIF keeps grey exactly"
        assert error.mean() < 4
        decoded = mp4_frames(Path(f"videos/{k:06d}.mp4"))
        assert decoded.shape == array[k].shape
        error = np.abs(decoded.astype(int) - array[k])
        assert error.mean() < 4, "half the resolution of colour is lost, no more"
        wrong = np.abs(decoded.astype(int) - array[k][::-1]).mean()
        assert wrong > 4 * error.mean(), "the frames come in their order"


def test_an_mp4_is_what_players_expect(own_folder: Path) -> None:
    write(own_folder, videos(1, side=31), formats=["mp4"], fps=12.5)
    with av.open("videos/000000.mp4") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.format.name == "yuv420p"
        assert (stream.width, stream.height) == (32, 32)
        assert stream.average_rate == Fraction(25, 2)
        assert stream.frames == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    expected = as_bytes(videos(1, side=31))[0].astype(int)
    assert np.abs(decoded[:, :31, :31].astype(int) - expected).mean() < 4
    assert np.abs(decoded[:, 31].astype(int) - decoded[:, 30]).mean() < 12, "the edge was copied"


def test_mpeg4_serves_where_there_is_no_h264(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_files, "video_codec", lambda: "mpeg4")
    frames = as_bytes(videos(1))[0]
    video_files.save_mp4(frames, own_folder / "a.mp4", 8)
    assert np.abs(mp4_frames(own_folder / "a.mp4").astype(int) - frames).mean() < 6


@pytest.mark.parametrize(("side", "factor"), [(32, 2), (48, 2), (64, 1), (100, 1)])
def test_small_videos_are_enlarged_in_the_playing_grid(side: int, factor: int) -> None:
    array = as_bytes(videos(3, side=side))
    grid = playing_grid(array)
    assert grid.shape == (8, 2 * (side * factor + 2) + 2, 2 * (side * factor + 2) + 2, 3)
    left = 2 + side * factor + 2
    assert np.array_equal(
        grid[5, 2 : 2 + side * factor : factor, left : left + side * factor : factor], array[1, 5]
    )


def test_the_sheet_has_a_video_a_row_and_a_frame_a_column() -> None:
    array = as_bytes(videos(3, side=64))
    sheet = frame_sheet(array)
    assert sheet.shape == (3 * 66 + 2, 8 * 66 + 2, 3)
    assert np.array_equal(sheet[2 + 2 * 66 : 66 + 2 * 66, 2 + 6 * 66 : 66 + 6 * 66], array[2, 6])
    assert np.array_equal(picture_of(videos(3, side=64)), sheet)
    assert picture_of(videos(3)[:, 0]).shape == (2 * 34 + 2, 2 * 34 + 2, 3)


def test_grids_show_the_first_videos_only(own_folder: Path) -> None:
    write(own_folder, videos(20, frames=2, side=16), batch=7, formats=["grid"])
    assert sorted(path.name for path in own_folder.iterdir()) == ["grid.gif", "grid.png", "samples.npz"]
    with Image.open("grid.png") as sheet, Image.open("grid.gif") as playing:
        assert sheet.size == (2 * 66 + 2, 8 * 66 + 2)
        assert playing.size == (4 * 66 + 2, 4 * 66 + 2)
        assert playing.info["loop"] == 0


def test_the_archive_does_not_depend_on_the_batches(own_folder: Path) -> None:
    for name, batch in (("a", 1), ("b", 3)):
        (own_folder / name).mkdir()
        write(own_folder / name, videos(4), batch, formats=["gif"])
    assert Path("a/samples.npz").read_bytes() == Path("b/samples.npz").read_bytes()
    assert Path("a/videos/000003.gif").read_bytes() == Path("b/videos/000003.gif").read_bytes()


def test_latents_are_decoded_frame_by_frame(own_folder: Path) -> None:
    class Repeats:
        dtype = torch.float32

        def decode(self, latents: torch.Tensor) -> object:
            assert latents.ndim == 4
            return type(
                "Output", (), {"sample": latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)}
            )

    latents = torch.zeros(2, 4, 4, 8, 8)
    latents[1, 3] = 0.5
    write(own_folder, latents, decoder=VaeDecoder(Repeats(), 0.5, 0.0, own_folder), formats=["frames"])
    with np.load("samples.npz") as archive:
        assert archive["arr_0"].shape == (2, 4, 16, 16, 3)
        assert archive["arr_0"][1, 3].min() == 255
        assert archive["arr_0"][1, 2].max() == 128


def test_what_was_written_is_data_for_training(own_folder: Path) -> None:
    samples = videos(6)
    write(own_folder, samples, formats=["mp4"])
    split = open_data("videos", geometry=VideoShape(32, 3, 0, 8))
    clips = [split.train.sample(index)[0] for index in range(5)]
    first = int(split.train.key(0)[:6])
    assert float((clips[0] - samples[first]).abs().mean()) < 4 / 127.5
    archive = open_data("samples.npz", geometry=VideoShape(32, 3, 0, 8))
    assert len(archive.train) == 5


@pytest.mark.parametrize(
    ("options", "match", "why"),
    [
        ({"formats": ["mp4", "gfi"]}, "'gfi' is not a format", "Did you mean 'gif'?"),
        ({"formats": ["xyz"]}, "'xyz' is not a format", "These are: mp4, gif, frames, grid."),
        ({"fps": 0}, "0 frames a second", "It is a number above 0."),
        ({"fps": float("nan")}, "nan frames a second", "It is a number above 0."),
        ({"fps": 60}, "60 frames a second", "A GIF shows at most 50."),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(
    own_folder: Path, options: dict, match: str, why: str
) -> None:
    with pytest.raises(DyditError, match=match) as caught:
        VideoWriter(own_folder, 1, **options)
    assert caught.value.why == why
    assert caught.value.fix.endswith(".")


def test_the_schema_knows_the_formats() -> None:
    fields = SampleSection.model_fields
    (literal, _) = get_args(fields["video_formats"].annotation)
    assert get_args(literal) == FORMATS
    assert fields["video_formats"].default == DEFAULT_FORMATS
    assert fields["fps"].default == DEFAULT_FPS


def test_mp4_alone_may_be_fast(own_folder: Path) -> None:
    write(own_folder, videos(1), formats=["mp4"], fps=60)
    with av.open("videos/000000.mp4") as container:
        assert container.streams.video[0].average_rate == 60


def test_nothing_is_drawn_after_a_failure(own_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), VideoWriter(own_folder, 2) as writer:
        writer.write(videos(1))
        _ = 1 / 0
    assert not (own_folder / "grid.gif").exists()
