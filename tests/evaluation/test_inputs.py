"""Everything that can be evaluated: folders, archives, videos, models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dydit_cli.artifacts import save_model
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.inputs.model import SamplingSettings, executed_mmacs, open_model
from dydit_cli.evaluation.inputs.opening import open_source
from dydit_cli.flops import count_macs
from dydit_cli.sampling.run import sample
from tests.evaluation.sources import archive, collected_pictures, image_folder, pictures, saved_model
from tests.tiny import tiny_model

NOTHING = SamplingSettings()


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    images = pictures(5)
    source = open_source(image_folder(tmp_path / "i", images), NOTHING)
    assert (source.kind, len(source), source.labels) == ("folder", 5, None)
    assert torch.equal(collected_pictures(list(source.batches(2))), images)
    assert len(open_source(tmp_path / "i", NOTHING, limit=3)) == 3


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for name, seed in (("b", 1), ("a", 2)):
        image_folder(tmp_path / "i" / name, pictures(2, seed))
    source = open_source(tmp_path / "i", NOTHING)
    assert source.labels == [0, 0, 1, 1]
    assert torch.equal(collected_pictures(list(source.batches(3)))[:2], pictures(2, 2))


def test_folders_of_frames_are_videos(tmp_path: Path) -> None:
    videos = pictures(3, frames=12)
    for index, video in enumerate(videos):
        folder = image_folder(tmp_path / "v" / f"video{index}", video)
        for file in list(folder.iterdir()):
            # Without leading zeros the order of names is not that of time.
            file.rename(folder / f"frame_{int(file.stem)}.png")
    source = open_source(tmp_path / "v", NOTHING, videos=True)
    assert source.describe() == {
        "kind": "video folder",
        "path": str(tmp_path / "v"),
        "videos": 3,
        "frames": 12,
    }
    assert torch.equal(collected_pictures(list(source.batches(2))), videos)
    (tmp_path / "v" / "video1" / "frame_11.png").unlink()
    with pytest.raises(DyditError, match="not equally long"):
        open_source(tmp_path / "v", NOTHING, videos=True)


def test_archives_of_images_and_videos(tmp_path: Path) -> None:
    images = pictures(4)
    source = open_source(archive(tmp_path / "a.npz", images, arr_1=np.arange(4)), NOTHING)
    assert (source.kind, source.labels) == ("npz", [0, 1, 2, 3])
    assert torch.equal(collected_pictures(list(source.batches(3))), images)
    source = open_source(archive(tmp_path / "v.npz", pictures(2, frames=5)), NOTHING)
    assert source.describe() | {"path": ""} == {"kind": "video npz", "path": "", "videos": 2, "frames": 5}
    # As `dydit sample` writes videos.
    (tmp_path / "s").mkdir()
    archive(tmp_path / "s" / "samples.npz", pictures(2, frames=5))
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({"settings": {"classes": [3], "steps": 7}}))
    source = open_source(tmp_path / "s", NOTHING)
    assert (len(source), source.labels, source.describe()["made_by"]["steps"]) == (2, [3, 3], 7)


def test_samples_tell_how_they_were_made(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m")
    sample(model, tmp_path / "s", num_images=6, steps=2, seed=3, sampler="ddim", device="cpu", classes=[4, 2])
    source = open_source(tmp_path / "s", NOTHING)
    facts = source.describe()
    assert source.labels == [4, 2, 4, 2, 4, 2]
    assert (facts["made_by"]["seed"], facts["made_by"]["steps"], facts["made_by"]["sampler"]) == (
        3,
        2,
        "ddim",
    )
    sample(model, tmp_path / "all", num_images=11, steps=1, device="cpu")
    assert open_source(tmp_path / "all", NOTHING).labels == [*range(10), 0]
    # A foreign manifest is no reason to stop.
    (tmp_path / "s" / "manifest.json").write_text(json.dumps([1]))
    assert open_source(tmp_path / "s", NOTHING).labels is None


def test_a_model_gives_what_sample_writes(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m")
    asked = {"num_images": 5, "steps": 2, "guidance": 2.0, "seed": 1, "batch_size": 2, "device": "cpu"}
    source = open_source(model, SamplingSettings(**asked))
    batches = list(source.batches(64))
    sample(model, tmp_path / "s", **asked)
    written = collected_pictures(list(open_source(tmp_path / "s", NOTHING).batches(5)))
    assert torch.equal(collected_pictures(batches), written)
    assert source.labels == [0, 1, 2, 3, 4]
    assert all(batch.seconds is not None and batch.ratios is not None for batch in batches)


def test_the_executed_macs_of_a_model(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "m")
    compact = open_model(path, SamplingSettings(num_images=1, device="cpu")).model
    static = open_model(path, SamplingSettings(num_images=1, device="cpu", execution="static")).model
    whole = count_macs(static).total / 1e6
    assert executed_mmacs(static, 1.0) == pytest.approx(whole)
    counts = {
        name: open_model(path, SamplingSettings(num_images=1, device="cpu", execution=name)).describe()[
            "parameters"
        ]
        for name in ("compact", "static")
    }
    assert counts["compact"] - counts["static"] == sum(each.numel() for each in compact.router_parameters())
    assert counts["compact"] > counts["static"]
    t = torch.tensor([500])
    shape = (1, 1, 32, 32)
    routing = compact.routing(t, torch.zeros(shape), torch.tensor([0]))
    counted = count_macs(compact, routing)
    ratio = (counted.attention + counted.mlp) / (count_macs(compact).attention + count_macs(compact).mlp)
    normalised = count_macs(compact).layernorm - counted.layernorm
    expected = (counted.total + normalised) / 1e6
    assert executed_mmacs(compact, float(ratio)) == pytest.approx(expected, rel=1e-6)
    assert counted.total / 1e6 == pytest.approx(expected, rel=0.01)


def test_a_latent_model_needs_an_autoencoder(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m", in_channels=4)
    with pytest.raises(DyditError, match="makes latents") as caught:
        open_source(model, SamplingSettings(device="cpu"))
    assert "--vae" in caught.value.fix


def test_a_video_model_gives_videos(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m", "latte", sample_size=8, patch_size=2)
    source = open_source(model, SamplingSettings(num_images=3, steps=1, batch_size=2, device="cpu"))
    videos = collected_pictures(list(source.batches(64)))
    assert videos.ndim == 5
    assert (len(videos), *videos.shape[2:]) == (3, 8, 8, 1)
    assert videos.shape[1] > 1


def test_a_model_of_texts_is_evaluated_by_its_images(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_model(tiny_model("flux"), tmp_path / "m")
    with pytest.raises(DyditError, match="model of texts") as caught:
        open_source(tmp_path / "m", SamplingSettings(device="cpu"))
    assert "--prompts" in caught.value.fix


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 8, 8, 3)))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    mixed = image_folder(tmp_path / "mixed", pictures(2))
    image_folder(tmp_path / "other", pictures(1, side=9))
    (tmp_path / "other" / "0000.png").rename(mixed / "0009.png")
    for name in ("empty", "text.txt", "nowhere", "broken.npz", "floats.npz", "objects.npz", "mixed"):
        with pytest.raises(DyditError):
            list(open_source(tmp_path / name, NOTHING).batches(2))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "i", pictures(2))
    (folder / "0001.png").write_bytes(b"no picture")
    with pytest.raises(DyditError, match=r"0001\.png"):
        list(open_source(folder, NOTHING).batches(2))
