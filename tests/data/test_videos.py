"""Videos as training data: files, folders of frames, moving garments and ready clips, and every way to be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dydit_cli.data import TrainingBatches, open_data
from dydit_cli.data.clips import ClipShape, moment_of
from dydit_cli.data.mirror import MirrorRule
from dydit_cli.data.moving import motion_of
from dydit_cli.data.spec import parse_spec
from dydit_cli.data.video_files import read_clip
from dydit_cli.errors import DyditError
from dydit_cli.randomness import normal
from tests.data.videos import VideoShape, drifting, numbered, save_frames, save_video

COLOUR, GREY = VideoShape(), VideoShape(in_channels=1)
FLAT = VideoShape(num_classes=0)
LATENT = VideoShape(8, 4, 3)
MOVING = VideoShape(32, 1, 10, 8)
CONTAINERS = [
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("mov", "mjpeg"),
    ("avi", "mpeg4"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("gif", "gif"),
    ("mpg", "mpeg2video"),
]


class ImageShape:
    """A model of images."""

    sample_size = 32
    in_channels = 1
    num_classes = 10


def refused(match: str, spec: Path | str, shape: object) -> DyditError:
    with pytest.raises(DyditError, match=match) as caught:
        open_data(spec, geometry=shape)  # type: ignore[arg-type]
    assert caught.value.why.endswith((".", "?"))
    assert caught.value.fix.endswith(".")
    return caught.value


def class_folders(root: Path, per_class: int = 4, frames: int = 8) -> Path:
    """Class ``a``: video files. Class ``b``: folders of frames."""
    for number in range(per_class):
        save_video(root / "a" / f"{number}.mp4", numbered(frames))
        save_frames(root / "b" / f"clip{number}", numbered(frames))
    return root


def frame_numbers(clip: torch.Tensor, step: int = 8) -> list[int]:
    """Which frames of `numbered` a clip shows, from their brightness."""
    bytes_ = (clip.double().mean(dim=(1, 2, 3)) + 1) * 127.5
    found = (bytes_ / step).round()
    assert float((bytes_ - found * step).abs().max()) < step / 3, "no value in doubt"
    return [int(number) for number in found]


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_a_clip_is_exact_in_every_container(own_folder: Path, container: str, codec: str) -> None:
    # rgb8, the GIF encoder's, has few levels of grey, and they must stay apart.
    step, frames = (32, 8) if codec == "gif" else (8, 30)
    path = save_video(own_folder / f"a.{container}", numbered(frames, step=step), codec)
    clip = ClipShape(3, 2)
    starts = frames - clip.span + 1
    for start in range(starts):
        images = read_clip(path, clip, (start + 0.5) / starts)
        seen = [round(np.asarray(image).mean() / step) for image in images]
        assert seen == [start, start + 2, start + 4]


def test_class_folders_of_files_and_of_frames(own_folder: Path) -> None:
    split = open_data(class_folders(own_folder / "set"), geometry=COLOUR)
    assert len(split.train) + len(split.held_out) == 8
    assert split.held_out_from == "hash"
    assert split.mirror.enabled
    keys = {split.train.key(index): int(split.train.labels[index]) for index in range(len(split.train))}
    assert all(label == (0 if key.startswith("a/") else 1) for key, label in keys.items())
    assert {"a/0.mp4", "b/clip3"} <= keys.keys() | {split.held_out.key(0)}
    for index in range(len(split.train)):
        clip, _ = split.train.sample(index)
        assert clip.shape == (4, 3, 16, 16)
        assert clip.dtype == torch.float32
        assert frame_numbers(clip) == [2, 3, 4, 5], "the middle clip"
    described = split.describe()
    assert described["kind"] == "video folder"
    assert described["classes"] == ["a", "b"]
    assert (described["frames"], described["frame_interval"]) == (4, 1)


def test_grey_models_see_grey(own_folder: Path) -> None:
    split = open_data(class_folders(own_folder / "set", per_class=1), geometry=GREY)
    assert split.train.sample(0)[0].shape == (4, 1, 16, 16)


def test_a_model_without_classes_takes_videos_wherever_they_lie(own_folder: Path) -> None:
    root = class_folders(own_folder / "set", per_class=2)
    save_video(root / "loose.webm", numbered(8), "libvpx")
    (root / "notes.txt").write_text("no video")
    (root / "poster.png").write_bytes(b"beside a video, a picture is no frame")
    (root / ".hidden.mp4").write_bytes(b"")
    for classes in (0, 1):
        split = open_data(root, geometry=VideoShape(num_classes=classes))
        parts = (split.train, split.held_out)
        assert sum(map(len, parts)) == 5
        assert not any(part.labels.any() for part in parts)
        assert split.warnings == ()


def test_the_hold_out_goes_by_video_and_stays(own_folder: Path) -> None:
    for number in range(30):
        save_frames(own_folder / "set" / f"{number:02d}", numbered(4))
    first = open_data("set", geometry=FLAT)
    held_out = {first.held_out.key(index) for index in range(len(first.held_out))}
    assert len(held_out) == 3
    assert not held_out & {first.train.key(index) for index in range(len(first.train))}
    again = open_data("set:frame_interval=1", geometry=VideoShape(num_classes=0, num_frames=2))
    assert held_out == {again.held_out.key(index) for index in range(len(again.held_out))}


def test_training_draws_where_a_clip_begins(own_folder: Path) -> None:
    for number in range(10):
        save_frames(own_folder / "set" / f"{number}", numbered(12))
    train = open_data("set", geometry=FLAT).train

    def draw(step: int):
        return lambda position, shape: normal(0, shape, "posterior", step, position)

    starts = []
    for step in range(20):
        batch = train.batch(range(9), draw(step))
        assert torch.equal(batch, train.batch(range(9), draw(step))), "a function of step and position"
        for clip in batch:
            numbers = frame_numbers(clip)
            assert numbers == list(range(numbers[0], numbers[0] + 4))
            starts.append(numbers[0])
    counts = torch.bincount(torch.tensor(starts), minlength=9)
    assert len(counts) == 9
    assert int(counts.min()) > 6, "all starts are about as likely: 180 draws of 9"
    assert torch.equal(train.sample(3)[0], train.batch([3])[0])


def test_moments_are_uniform() -> None:
    assert moment_of(None, 0) is None
    assert moment_of(lambda position, shape: torch.zeros(shape), 0) == 0.5
    assert moment_of(lambda position, shape: torch.tensor(50.0), 0) == 1.0
    assert ClipShape(4).within(9, 1.0, Path("v"))[-1] == 8
    assert ClipShape(4).within(9, 0.0, Path("v"))[0] == 0
    assert ClipShape(4).within(4, None, Path("v")) == range(4)


def test_frames_may_lie_apart(own_folder: Path) -> None:
    class_folders(own_folder / "set", per_class=2, frames=12)
    split = open_data("set:frame_interval=3", geometry=COLOUR)
    assert split.describe()["frame_interval"] == 3
    for part in (split.train, split.held_out):
        for index in range(len(part)):
            assert frame_numbers(part.sample(index)[0]) == [1, 4, 7, 10]


def test_the_middle_is_cut_out(own_folder: Path) -> None:
    frames = np.zeros((4, 32, 96, 3), np.uint8)
    frames[:, :, 32:64] = 255
    save_frames(own_folder / "set" / "one", frames)
    save_frames(own_folder / "set" / "two", frames)
    clip, _ = open_data("set", geometry=FLAT).train.sample(0)
    assert float(clip[..., 2:-2].min()) == 1.0


def test_a_mirror_turns_all_frames_alike(own_folder: Path) -> None:
    for number in range(6):
        save_frames(own_folder / "set" / f"{number}", drifting(4, 16).permute(0, 2, 3, 1).numpy())
    train = open_data("set", geometry=FLAT).train
    plain = TrainingBatches(train, 16, 0, MirrorRule(False)).at(0).clean
    mirrored = TrainingBatches(train, 16, 0, MirrorRule(True)).at(0).clean
    turned = [not torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert 2 < sum(turned) < 14
    for before, after, flipped in zip(plain, mirrored, turned, strict=True):
        assert torch.equal(after, before.flip(3) if flipped else before)


def test_workers_read_the_same_clips(own_folder: Path) -> None:
    class_folders(own_folder / "set", per_class=2)
    train = open_data("set", geometry=COLOUR).train
    batches = TrainingBatches(train, 3, 0, MirrorRule(True))
    for here, there in zip(batches.between(0, 2), batches.between(0, 2, num_workers=1), strict=True):
        assert torch.equal(here.clean, there.clean)


def test_broken_videos_are_named(own_folder: Path) -> None:
    root = class_folders(own_folder / "set", per_class=2)
    good = (root / "a" / "0.mp4").read_bytes()
    texts = {
        "empty.mp4": (b"", "cannot be read"),
        "text.avi": (b"hello, I am no video" * 50, "cannot be read"),
        "half.mp4": (good[: len(good) // 2], "cannot be read"),
    }
    for name, (content, match) in texts.items():
        path = root / "a" / name
        path.write_bytes(content)
        with pytest.raises(DyditError, match=rf"a/{name} {match}"):
            _read_all(root)
        path.unlink()
    png = root / "b" / "clip0" / "frame3.png"
    png.write_bytes(png.read_bytes()[:50])
    with pytest.raises(DyditError, match=r"b/clip0/frame3\.png cannot be read"):
        _read_all(root)


def test_sound_is_no_video(own_folder: Path) -> None:
    import av

    with av.open("sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DyditError, match=r"sound\.mp4 cannot be read") as caught:
        read_clip(own_folder / "sound.mp4", ClipShape(4), None)
    assert caught.value.why == "It holds no video stream."


def test_names_are_paths_not_addresses(own_folder: Path) -> None:
    path = save_video(own_folder / "concat:a: 100%.mkv", numbered(4))
    assert len(read_clip(path, ClipShape(4), None)) == 4


def test_short_videos_are_named(own_folder: Path) -> None:
    root = class_folders(own_folder / "set", per_class=2)
    short = save_video(root / "a" / "short.mp4", numbered(3))
    with pytest.raises(DyditError, match=r"a/short\.mp4 has 3 frames") as caught:
        _read_all(root)
    assert caught.value.why == "The model takes clips of 4 frames."
    short.unlink()
    save_frames(root / "b" / "short", numbered(1))
    with pytest.raises(DyditError, match="b/short has 1 frame"):
        _read_all(root)
    with pytest.raises(DyditError, match="has 8 frames") as caught:
        _read_all(f"{root}:frame_interval=3")
    assert caught.value.why == "The model takes clips of 4 frames 3 frames apart (10 from first to last)."
    assert "lower frame_interval" in caught.value.fix


def _read_all(spec: Path | str) -> None:
    split = open_data(spec, geometry=COLOUR)
    for part in (split.train, split.held_out):
        part.batch(range(len(part)))


def test_folders_that_do_not_fit(own_folder: Path) -> None:
    root = class_folders(own_folder / "set", per_class=1)
    (root / "c").mkdir()
    refused("3 class folders, the model has 2 classes", root, COLOUR)
    refused("class folder .*c holds no videos", root, VideoShape(num_classes=3))
    (root / "c").rmdir()
    refused("holds videos, but the model is trained on latents", root, VideoShape(in_channels=4))
    assert "2 classes, the model 3" in open_data(root, geometry=VideoShape(num_classes=3)).warnings[0]
    refused("do not lie in class folders", root / "a", COLOUR)
    error = refused(
        "class folder .*clip0 holds images, but no video", root / "b", VideoShape(num_classes=1000)
    )
    assert "clip0/<video>/0001.png" in error.fix
    (own_folder / "empty").mkdir()
    refused("empty holds no videos", "empty", COLOUR)
    refused("empty holds no videos", "empty", FLAT)
    refused("holds images, but no video", root / "b" / "clip0", FLAT)


def test_the_interval_is_an_option_of_folders_of_videos(own_folder: Path) -> None:
    class_folders(own_folder / "set", per_class=1)
    assert (
        "Did you mean 'frame_interval'?"
        in refused("'frame_intervall' is not", "set:frame_intervall=2", COLOUR).why
    )
    for value in ("0", "-1", "two", "1.5", ""):
        refused("frame_interval of", f"set:frame_interval={value}", COLOUR)
    refused("has no frame_interval", "moving-fashion-mnist:frame_interval=2", MOVING)
    refused("has no frame_interval", "fashion-mnist-subset:frame_interval=2", ImageShape())
    assert parse_spec("C:/videos").name == "C:/videos"
    class_folders(own_folder / "odd:frame_interval=2", per_class=1)
    assert parse_spec("odd:frame_interval=2").frame_interval is None


class TestMovingGarments:
    def test_they_keep_their_class_and_move(self) -> None:
        split = open_data("moving-fashion-mnist", geometry=MOVING)
        still = open_data("fashion-mnist-subset", geometry=ImageShape())
        assert torch.equal(split.train.labels, still.train.labels)
        assert (len(split.train), len(split.held_out), split.held_out_from) == (10_000, 1000, "t10k files")
        assert split.mirror == still.mirror
        clips = split.train.batch(range(50))
        assert clips.shape == (50, 8, 1, 32, 32)
        assert (float(clips.min()), float(clips.max())) == (-1.0, 1.0)
        light = (clips + 1).flatten(2).sum(dim=2)
        # The garment stays whole: nothing leaves the canvas.
        assert torch.allclose(light, light[:, :1].expand_as(light), rtol=1e-5)
        # The slowest need two frames for a pixel.
        changed = (clips[:, 2:] - clips[:, :-2]).abs().flatten(2).amax(dim=2)
        assert float((changed > 0).float().mean()) > 0.95
        rows = torch.arange(32.0)
        middle = ((clips + 1).sum(dim=(2, 3)) * rows).sum(-1) / (clips + 1).sum(dim=(2, 3, 4))
        assert float((middle.amax(1) - middle.amin(1)).median()) > 2

    def test_a_clip_is_a_function_of_its_number(self) -> None:
        first, again = (open_data("moving-fashion-mnist", geometry=MOVING) for _ in range(2))
        assert torch.equal(first.train.batch([7, 3]), again.train.batch([7, 3]))
        assert torch.equal(first.train.sample(3)[0], first.train.batch([7, 3])[1])
        drawn = first.train.batch([7, 3], lambda position, shape: torch.randn(shape))
        assert torch.equal(drawn, first.train.batch([7, 3]))
        assert motion_of("train", 3) != motion_of("t10k", 3)
        assert motion_of("train", 3) != motion_of("train", 4)

    def test_motion_stays_inside_and_follows_a_line_between_walls(self) -> None:
        for index in range(100):
            motion = motion_of("train", index)
            places = torch.tensor([motion.at(frame) for frame in range(40)])
            assert float(places.min()) >= 0
            assert float(places.max()) <= 1
            steps = (places[1:] - places[:-1]).abs()
            assert float((steps - torch.tensor(motion.step).abs()).max()) < 1e-6
            pixels = torch.linalg.norm(torch.tensor(motion.step)) * 8
            assert 0.5 <= float(pixels) <= 1.5 + 1e-6

    def test_the_model_says_how_many_frames_and_how_large(self) -> None:
        split = open_data("moving-fashion-mnist", geometry=VideoShape(48, 1, 10, 16))
        assert split.train.sample(0)[0].shape == (16, 1, 48, 48)

    def test_a_folder_of_idx_files(self, own_folder: Path) -> None:
        from tests.data.test_open_data import grey_images, labels_of, write_idx

        (own_folder / "idx").mkdir()
        write_idx(own_folder / "idx", "train", grey_images(30, 28), labels_of(30))
        split = open_data("moving-fashion-mnist:idx", geometry=MOVING)
        assert (len(split.train), len(split.held_out)) == (27, 3)
        assert not split.mirror.enabled, "these may be digits"
        refused("holds images, the model takes videos", "idx", MOVING)
        assert "moving-fashion-mnist:idx" in refused("holds images", "idx", MOVING).fix
        refused("grey images, the model takes 3", "moving-fashion-mnist:idx", VideoShape(32, 3, 10, 8))
        refused("There is no folder nowhere", "moving-fashion-mnist:nowhere", MOVING)

    def test_models_that_want_something_else(self) -> None:
        assert (
            "fashion-mnist-subset"
            in refused("the model takes images", "moving-fashion-mnist", ImageShape()).fix
        )
        refused("the model takes latents", "moving-fashion-mnist", VideoShape(32, 4, 10, 8))
        assert "moving-fashion-mnist" in refused("takes videos", "fashion-mnist-subset", MOVING).fix
        assert "did you mean 'moving-fashion-mnist'" in refused("no data", "moving-fashion-minst", MOVING).why


class TestReadyClips:
    def test_npz_in_three_layouts(self, own_folder: Path) -> None:
        clips = np.random.default_rng(0).integers(0, 256, (20, 4, 16, 16, 3), dtype=np.uint8)
        np.savez("last.npz", arr_0=clips, arr_1=np.arange(20) % 2)
        np.savez("first.npz", arr_0=clips.transpose(0, 1, 4, 2, 3), arr_1=np.arange(20) % 2)
        samples = [
            open_data(name, geometry=COLOUR).train.batch(range(18)) for name in ("last.npz", "first.npz")
        ]
        assert torch.equal(*samples)
        np.savez("grey.npz", arr_0=clips[..., 0])
        assert open_data("grey.npz", geometry=VideoShape(16, 1, 0, 4)).train.sample(0)[0].shape == (
            4,
            1,
            16,
            16,
        )
        refused("has no labels", "grey.npz", GREY)
        refused("holds videos of shape", "last.npz", VideoShape(num_frames=8))
        refused("16x16, the model takes 8x8", "last.npz", VideoShape(8))
        np.savez("stills.npz", arr_0=clips[:, 0], arr_1=np.arange(20) % 2)
        refused("holds videos of shape", "stills.npz", COLOUR)
        refused("holds videos, but the model is trained on latents", "last.npz", LATENT)

    def test_latents(self, own_folder: Path) -> None:
        latents, labels = torch.randn(20, 4, 4, 8, 8), torch.arange(20) % 3
        np.savez("l.npz", latents=latents.numpy(), labels=labels.numpy(), scale=0.5)
        save_file({"latents": latents, "labels": labels}, "l.safetensors", {"scale": "0.5"})
        for name in ("l.npz", "l.safetensors"):
            train = open_data(name, geometry=LATENT).train
            clip, label = train.sample(0)
            first = int(train.indices[0])  # type: ignore[attr-defined]
            assert torch.equal(clip, latents[first] * 0.5)
            assert label == first % 3
        save_file({"latents": latents}, "plain.safetensors", {"scale": "1"})
        assert not open_data("plain.safetensors", geometry=VideoShape(8, 4, 0)).train.labels.any()
        refused("has no labels", "plain.safetensors", LATENT)
        refused("latents of shape", "l.npz", VideoShape(8, 4, 3, 5))
        np.savez("noscale.npz", latents=latents.numpy(), labels=labels.numpy())
        refused("does not state the scale", "noscale.npz", LATENT)
        np.savez("noscale.npz", arr_0=latents.numpy(), arr_1=labels.numpy())
        refused("does not state the scale", "noscale.npz", LATENT)

    def test_posteriors(self, own_folder: Path) -> None:
        mean, log_variance = torch.full((20, 4, 4, 8, 8), 3.0), torch.full((20, 4, 4, 8, 8), 2 * np.log(0.5))
        moments = torch.cat([mean, log_variance], dim=2).numpy()
        np.savez("m.npz", moments=moments, labels=np.arange(20) % 3, scale=0.5)
        train = open_data("m.npz", geometry=LATENT).train
        ones = train.batch([0, 1], lambda _, shape: torch.ones(shape))
        assert torch.allclose(ones, torch.full((2, 4, 4, 8, 8), 0.5 * 3.5))
