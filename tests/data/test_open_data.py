"""Every format that ``--data`` takes, and every way in which one can be wrong."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dydit_cli.data import open_data
from dydit_cli.data.folder import centre_crop
from dydit_cli.errors import DyditError


@dataclass(frozen=True)
class Shape:
    """The part of a geometry that data reads."""

    sample_size: int = 8
    in_channels: int = 1
    num_classes: int = 3


GREY, COLOUR, LATENT = Shape(), Shape(in_channels=3), Shape(in_channels=4)


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, packed: bool = True) -> None:
    for array, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        data = header + array.astype(np.uint8).tobytes()
        path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)


def grey_images(count: int, size: int = 8) -> np.ndarray:
    return (np.arange(count * size * size) % 256).astype(np.uint8).reshape(count, size, size)


def labels_of(count: int) -> np.ndarray:
    return np.arange(count) % 3


def image_folder(root: Path, per_class: int = 4, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> Path:
    for name in ("ant", "bee", "cow"):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new(mode, size, color=(10 * number, 0, 0) if mode == "RGB" else 10 * number).save(
                root / name / f"{number}.png"
            )
    return root


def refused(match: str, spec: Path | str, shape: Shape) -> DyditError:
    with pytest.raises(DyditError, match=match) as caught:
        open_data(spec, geometry=shape)
    assert caught.value.why.endswith((".", "?"))
    assert caught.value.fix.endswith(".")
    return caught.value


def test_the_shipped_subset_is_balanced_padded_and_scaled() -> None:
    split = open_data("fashion-mnist-subset", geometry=Shape(32, 1, 10))
    assert torch.bincount(split.train.labels).tolist() == [1000] * 10
    assert torch.bincount(split.held_out.labels).tolist() == [100] * 10
    image, label = split.train.sample(0)
    assert image.shape == (1, 32, 32)
    assert label == int(split.train.labels[0])
    assert image.min() == -1
    assert 0.5 < image.max() <= 1
    border = torch.cat([image[0, :2].flatten(), image[0, -2:].flatten(), image[0, :, :2].flatten()])
    assert bool((border == -1).all())
    assert split.held_out_from == "t10k files"
    assert (
        split.mirror.allows(0),
        split.mirror.allows(5),
        split.mirror.allows(7),
        split.mirror.allows(9),
    ) == (
        True,
        False,
        False,
        False,
    )


@pytest.mark.parametrize("packed", [True, False])
def test_idx_folder_with_its_own_test_part(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, "train", grey_images(6, 4), labels_of(6), packed)
    write_idx(tmp_path, "t10k", grey_images(3, 4), labels_of(3), packed)
    split = open_data(tmp_path, geometry=GREY)
    assert (len(split.train), len(split.held_out)) == (6, 3)
    image, _ = split.train.sample(1)
    assert image[0, 2, 2] == pytest.approx(16 / 127.5 - 1)
    assert not split.mirror_rule(True).enabled, "digits must not be mirrored"
    assert split.mirror_rule([]).allows(0), "unless it is asked for"
    assert not split.mirror_rule([2]).allows(2)


def test_idx_folder_without_a_test_part_holds_some_out(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", grey_images(60), labels_of(60))
    split = open_data(tmp_path, geometry=GREY)
    assert (len(split.train), len(split.held_out)) == (54, 6)
    assert torch.bincount(split.held_out.labels).tolist() == [2, 2, 2]


def test_idx_mistakes(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", grey_images(6), labels_of(6))
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    good = images.read_bytes()
    images.write_bytes(good[: len(good) // 2])
    refused("truncated or damaged", tmp_path, GREY)
    images.write_bytes(gzip.compress(gzip.decompress(good)[:-5]))
    refused("is truncated", tmp_path, GREY)
    images.write_bytes(gzip.compress(b"hello"))
    refused("not an IDX file", tmp_path, GREY)
    images.write_bytes(good)
    refused("8x8, the model takes 64x64", tmp_path, Shape(64))
    refused("grey images, the model takes 3 channels", tmp_path, COLOUR)
    refused("holds images, but the model is trained on latents", tmp_path, LATENT)
    refused("label 2, which the model does not have", tmp_path, Shape(num_classes=2))
    write_idx(tmp_path, "train", grey_images(6), labels_of(5))
    refused("6 samples but labels of shape", tmp_path, GREY)
    labels.unlink()
    refused("has no train-labels-idx1-ubyte.gz", tmp_path, GREY)


def test_image_folder_labels_follow_sorted_names(tmp_path: Path) -> None:
    split = open_data(image_folder(tmp_path), geometry=COLOUR)
    assert len(split.train) + len(split.held_out) == 12
    image, label = split.train.sample(0)
    assert image.shape == (3, 8, 8)
    assert label == 0
    assert split.train.describe()["classes"] == ["ant", "bee", "cow"]
    grey, _ = open_data(tmp_path, geometry=GREY).train.sample(0)
    assert grey.shape == (1, 8, 8)


def test_centre_crop_keeps_the_middle() -> None:
    pixels = np.zeros((32, 96), dtype=np.uint8)
    pixels[:, 32:64] = 255
    cropped = np.array(centre_crop(Image.fromarray(pixels), 8))
    assert cropped.shape == (8, 8)
    assert cropped[:, 2:-2].min() == 255


def test_image_folder_mistakes(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("is empty", empty, COLOUR)
    (empty / "notes.txt").write_text("no image")
    refused("holds no images", empty, COLOUR)
    (empty / "a").mkdir()
    refused("class folder .* holds no images", empty, COLOUR)
    (empty / "a").rmdir()
    Image.new("L", (4, 4)).save(empty / "loose.png")
    refused("do not lie in class folders", empty, COLOUR)
    folder = image_folder(tmp_path / "images")
    refused("3 class folders, the model has 2 classes", folder, Shape(in_channels=3, num_classes=2))
    refused("trained on latents", folder, LATENT)
    broken = folder / "bee" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    split = open_data(folder, geometry=COLOUR)
    with pytest.raises(DyditError, match=r"bee/0\.png cannot be read"):
        for source in (split.train, split.held_out):
            source.batch(range(len(source)))


def test_image_folder_warns_of_surprising_labels(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    warnings = " ".join(open_data(tmp_path, geometry=Shape(num_classes=4)).warnings)
    assert "sorted as text" in warnings
    assert "3 classes, the model 4" in warnings


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1"), ("x", "y")])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_npz_images_under_three_habits(tmp_path: Path, names: tuple[str, str], layout: str) -> None:
    images = np.zeros((20, 8, 8, 3), dtype=np.uint8)
    images[..., 1] = 255
    stored = images if layout == "NHWC" else images.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "set.npz", **{names[0]: stored, names[1]: labels_of(20)})
    split = open_data(tmp_path / "set.npz", geometry=COLOUR)
    image, _ = split.train.sample(0)
    assert [float(image[channel].mean()) for channel in range(3)] == [-1.0, 1.0, -1.0]
    assert len(split.held_out) == 2


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_npz_floats_end_in_minus_one_to_one(tmp_path: Path, low: float, high: float) -> None:
    images = np.linspace(low, high, 20 * 64).reshape(20, 8, 8)
    np.savez(tmp_path / "set.npz", images=images, labels=labels_of(20))
    split = open_data(tmp_path / "set.npz", geometry=GREY)
    values = torch.cat([split.train.batch(range(18)), split.held_out.batch(range(2))])
    assert (float(values.min()), float(values.max())) == pytest.approx((-1.0, 1.0))


def test_npz_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    good = {"images": grey_images(20), "labels": labels_of(20)}

    def with_(**changes: object) -> Path:
        np.savez(path, **{name: value for name, value in (good | changes).items() if value is not None})
        return path

    refused("labels of shape", with_(labels=labels_of(19)), GREY)
    refused("label 7", with_(labels=np.full(20, 7)), GREY)
    refused("label -1", with_(labels=np.full(20, -1)), GREY)
    refused("not whole numbers", with_(labels=np.full(20, 0.5)), GREY)
    refused("has no labels", with_(labels=None), GREY)
    refused("no array of images", with_(images=None), GREY)
    refused("16x16, the model takes 8x8", with_(images=grey_images(20, 16)), GREY)
    refused("1 channel.*takes 3", with_(), COLOUR)
    refused("holds images, but", with_(), LATENT)
    refused("values from 0 to 255", with_(images=grey_images(20).astype(np.float32)), GREY)
    refused("values from nan", with_(images=np.full((20, 8, 8), np.nan)), GREY)
    refused("has 1 sample", with_(images=grey_images(1), labels=labels_of(1)), GREY)
    path.write_bytes(path.read_bytes()[:200])
    refused("cannot be read as an .npz", path, GREY)
    refused("cannot be read as an .npz", with_(labels=np.array([{}] * 20, dtype=object)), GREY)


def test_latents_are_scaled_and_keep_their_channels(tmp_path: Path) -> None:
    latents = torch.linspace(-5, 5, 20 * 4 * 64).reshape(20, 4, 8, 8)
    labels = torch.arange(20) % 3
    np.savez(tmp_path / "a.npz", latents=latents.numpy(), labels=labels.numpy(), scale=0.18215)
    save_file(
        {"latents": latents, "labels": labels}, tmp_path / "b.safetensors", {"scaling_factor": "0.18215"}
    )
    save_file(
        {"latents": latents, "labels": labels, "scale": torch.tensor(0.18215)}, tmp_path / "c.safetensors"
    )
    np.save(tmp_path / "d.npy", latents.numpy())
    np.save(tmp_path / "names.npy", labels.numpy())
    (tmp_path / "d.json").write_text(json.dumps({"scale": 0.18215, "labels": "names.npy"}))
    for name in ("a.npz", "b.safetensors", "c.safetensors", "d.npy"):
        split = open_data(tmp_path / name, geometry=LATENT)
        assert len(split.train) == 18
        first = int(split.train.indices[0])  # type: ignore[attr-defined]
        sample, label = split.train.sample(0)
        assert torch.allclose(sample, latents[first] * 0.18215)
        assert label == first % 3
        assert not split.mirror.enabled
        assert not split.mirror_rule(True).enabled
        with pytest.raises(DyditError, match="cannot be mirrored"):
            split.mirror_rule([1])


def test_posteriors_are_drawn_with_their_deviation(tmp_path: Path) -> None:
    mean, log_variance = torch.full((20, 4, 8, 8), 3.0), torch.full((20, 4, 8, 8), 2 * np.log(0.5))
    np.savez(
        tmp_path / "m.npz",
        moments=torch.cat([mean, log_variance], 1).numpy(),
        labels=labels_of(20),
        scale=0.5,
    )
    train = open_data(tmp_path / "m.npz", geometry=LATENT).train
    ones = train.batch([0, 1], lambda _, shape: torch.ones(shape))
    assert torch.allclose(ones, torch.full((2, 4, 8, 8), 0.5 * 3.5))
    values = train.batch(range(18))
    assert float(values.std()) == pytest.approx(0.25, rel=0.05)
    assert torch.equal(train.sample(3)[0], values[3]), "without a draw, a sample depends on its index alone"


def test_latent_mistakes(tmp_path: Path) -> None:
    latents, labels = np.zeros((20, 4, 8, 8), dtype=np.float32), labels_of(20)
    path = tmp_path / "l.npz"
    np.savez(path, latents=latents, labels=labels)
    assert "numpy.savez" in refused("does not state the scale", path, LATENT).fix
    np.savez(path, latents=latents, labels=labels, scale=-1.0)
    refused("does not state the scale", path, LATENT)
    np.savez(path, latents=latents, scale=1.0)
    refused("has no labels", path, LATENT)
    np.savez(path, latents=latents[:, :3], labels=labels, scale=1.0)
    refused("latents of shape", path, LATENT)
    np.savez(path, latents=np.full_like(latents, np.inf), labels=labels, scale=1.0)
    refused("not finite", path, LATENT)
    np.save(tmp_path / "plain.npy", latents)
    refused("does not state the scale", tmp_path / "plain.npy", LATENT)
    (tmp_path / "plain.json").write_text("{")
    refused("plain.json cannot be read", tmp_path / "plain.npy", LATENT)
    save_file({"latents": torch.zeros(20, 4, 8, 8)}, tmp_path / "s.safetensors")
    refused("does not state the scale", tmp_path / "s.safetensors", LATENT)
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:100])
    refused("not a readable .safetensors", tmp_path / "s.safetensors", LATENT)
    save_file({"weights": torch.zeros(2)}, tmp_path / "w.safetensors", {"scale": "1"})
    refused("no array of latents", tmp_path / "w.safetensors", LATENT)


def test_an_odd_scale_is_a_warning(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((20, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "l.npz", latents=latents, labels=labels_of(20), scale=0.18215)
    assert "standard deviation of 0.18" in open_data(tmp_path / "l.npz", geometry=LATENT).warnings[0]


def test_missing_and_foreign_paths(tmp_path: Path) -> None:
    assert "did you mean 'fashion-mnist-subset'" in refused("no data at", "fashion-mnist-subst", GREY).why
    refused("no data at", tmp_path / "nowhere", GREY)
    (tmp_path / "a.txt").write_text("x")
    refused("is not a data file", tmp_path / "a.txt", GREY)
