"""Preparing pictures: where captions come from, buckets, shards that are resumed, and training that equals online encoding."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dydit_cli.data import TrainingBatches, open_data
from dydit_cli.data.buckets import buckets_of
from dydit_cli.data.cache import read_index
from dydit_cli.data.folder import as_pixels, centre_crop
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.errors import DyditError
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.preparation.cropping import bucket_sizes, choose_size, cover_crop
from dydit_cli.preparation.prepare import prepare
from dydit_cli.randomness import normal, uniform
from dydit_cli.recipe.schema import PrepareSection
from tests.flux_parts import PIPELINE, prepared, small_flux, write_pictures

GEOMETRY = small_flux().geometry


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def small_vae(tmp_path: Path) -> Path:
    """A tiny AutoencoderKL that reduces pictures twice."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    vae.save_pretrained(str(tmp_path / "vae"))
    return tmp_path / "vae"


def class_folders(folder: Path) -> Path:
    random = np.random.default_rng(1)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(5):
            pixels = random.integers(0, 256, (21, 17, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.mark.parametrize("captions", ["txt", "jsonl"])
def test_captions_lie_beside_images_or_in_one_file(tmp_path: Path, captions: str) -> None:
    report = prepared(tmp_path / "cache", data=str(write_pictures(tmp_path / "p", [(8, 8)] * 6, captions)))
    assert (report.samples, report.texts, report.left_out) == (6, 3, 0)
    found = lines_of(tmp_path / "cache" / "samples.jsonl")
    assert [line["prompt"] for line in found[:3]] == ["a sneaker", "a coat", "a bag"]


def test_webdataset_tars_keep_images_and_texts_together(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "part-0.tar", "w") as archive:
        for number in range(3):
            content = io.BytesIO()
            Image.new("L", (8, 8), number * 90).save(content, format="PNG")
            text = json.dumps({"caption": "a dress"}) if number == 1 else "a shirt"
            for suffix, data in (
                ("png", content.getvalue()),
                ("json" if number == 1 else "txt", text.encode()),
            ):
                member = tarfile.TarInfo(f"dir/{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    prepared(tmp_path / "cache", data=str(tmp_path / "part-0.tar"))
    found = lines_of(tmp_path / "cache" / "samples.jsonl")
    assert [line["prompt"] for line in found] == ["a shirt", "a dress", "a shirt"]
    source = open_data(tmp_path / "cache", geometry=GEOMETRY).train.source  # type: ignore[attr-defined]
    grey = [float(source.batch([index]).mean()) for index in range(3)]
    assert grey == pytest.approx([number * 90 / 127.5 - 1 for number in range(3)], abs=1e-5)


def test_class_folders_get_captions_from_a_template(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "animals")
    prepared(tmp_path / "cache", data=str(data), caption="a {class}", buckets=False)
    assert {line["prompt"] for line in lines_of(tmp_path / "cache" / "prompts.jsonl")} == {"a cat", "a dog"}
    with pytest.raises(DyditError, match="caption"):
        prepared(tmp_path / "other", data=str(data))


def test_buckets_keep_the_shape_and_batches_hold_one(tmp_path: Path) -> None:
    sizes = [(16, 8), (8, 16), (8, 8)] * 5
    report = prepared(tmp_path / "cache", data=str(write_pictures(tmp_path / "p", sizes)), resolution=16)
    assert len(report.sizes) > 1
    data = open_data(tmp_path / "cache", geometry=GEOMETRY)
    assert buckets_of(data.train) is not None
    batches = TrainingBatches(data.train, 2, 0, data.mirror)
    seen = [tuple(batches.at(step).clean.shape[2:]) for step in range(12)]
    assert len(set(seen)) > 1
    assert torch.equal(batches.at(5).clean, TrainingBatches(data.train, 2, 0, data.mirror).at(5).clean)


def test_sizes_have_about_one_area_and_squares_crop_as_adm() -> None:
    sizes = bucket_sizes((64,), 8, square=False)
    assert (64, 64) in sizes
    assert all(
        width % 8 == 0 and width * height <= 64 * 64 and width <= 2 * height <= 4 * width
        for width, height in sizes
    )
    assert bucket_sizes((64, 32), 8, square=True) == [(32, 32), (64, 64)]
    assert choose_size(900, 500, sizes)[0] > choose_size(900, 500, sizes)[1]
    assert choose_size(40, 40, bucket_sizes((64, 32), 8, square=True)) == (32, 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 90, 3), dtype=np.uint8))
    assert np.array_equal(np.array(cover_crop(image, 32, 32)), np.array(centre_crop(image, 32)))


def test_cached_training_equals_online_encoding(tmp_path: Path, small_vae: Path) -> None:
    """Posterior means and variances, of mirrored images too, drawn with the same numbers as encoding at each step would be."""
    data = class_folders(tmp_path / "animals")
    section = PrepareSection(
        data=str(data),
        vae=str(small_vae),
        resolution=(8,),
        mirror=True,
        batch_size=1,
        out=tmp_path / "cache",
        device="cpu",
    )
    report = prepare(section)
    assert (report.kind, report.classes, report.mirrored) == ("classes", ("cat", "dog"), True)
    geometry = Geometry(8, 1, 2, 2, 32, 4, 2, 4, 4, 4, 2)
    split = open_data(tmp_path / "cache", geometry=geometry)
    batches = TrainingBatches(split.train, 4, seed=3, mirror=split.mirror)
    vae = AutoencoderKL.from_pretrained(str(small_vae))
    flips = 0
    for step in range(3):
        batch = batches.at(step)
        for position in range(4):
            key = split.train.key(batches._sample_at(step * 4 + position))
            pixels = as_pixels(centre_crop(Image.open(data / key).convert("RGB"), 8))
            flip = float(uniform(3, (), "mirror", step, position)) < 0.5
            flips += flip
            with torch.no_grad():
                posterior = vae.encode((pixels.flip(-1) if flip else pixels)[None]).latent_dist
            noise = normal(3, (4, 4, 4), "posterior", step, position)
            online = (posterior.mean + posterior.std * noise - 0.1) * 0.5
            torch.testing.assert_close(batch.clean[position], online[0], rtol=0, atol=1e-6)
    assert 0 < flips < 12


def test_an_unfinished_run_goes_on_and_several_processes_write_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dydit_cli.preparation.prepare.SAMPLES_A_SHARD", 3)
    data = str(write_pictures(tmp_path / "p", [(8, 8)] * 8))
    prepared(tmp_path / "whole", data=data)
    prepared(tmp_path / "parts", data=data)
    (tmp_path / "parts" / "cache.json").unlink()
    (tmp_path / "parts" / "latents_00001.safetensors").unlink()
    with pytest.raises(DyditError, match="exists already"):
        prepared(tmp_path / "parts", data=data)
    assert prepared(tmp_path / "parts", data=data, resume=True).reused == 5
    prepared(tmp_path / "two", data=data, processes=2)
    for number in range(3):
        file = f"latents_{number:05d}.safetensors"
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "parts" / file).read_bytes() == whole
        assert (tmp_path / "two" / file).read_bytes() == whole


def test_a_damaged_picture_is_named_and_leaves_no_index(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", [(8, 8)] * 3)
    (folder / "01.png").write_bytes(b"no picture")
    with pytest.raises(DyditError, match=r"01\.png"):
        prepared(tmp_path / "cache", data=str(folder), buckets=False)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_texts_are_stored_once_and_given_back_in_order(tmp_path: Path) -> None:
    prepared(tmp_path / "cache", data=str(write_pictures(tmp_path / "p", [(8, 8)] * 6)))
    source = open_data(tmp_path / "cache", geometry=GEOMETRY).train.source  # type: ignore[attr-defined]
    texts = source.conditions([0, 1, 3, 4])
    assert isinstance(texts, TextCondition)
    assert torch.equal(texts.pooled[0], texts.pooled[2])
    assert torch.equal(texts.prompt_embeds[1], texts.prompt_embeds[3])
    assert not torch.equal(texts.pooled[0], texts.pooled[1])


def test_a_cache_of_texts_does_not_fit_other_models(tmp_path: Path) -> None:
    prepared(tmp_path / "cache", data=str(write_pictures(tmp_path / "p", [(8, 8)] * 4)))
    with pytest.raises(DyditError, match="holds texts"):
        open_data(tmp_path / "cache", geometry=Geometry(8, 1, 2, 2, 32, 4, 2, 4, 4, 4, 2))
    with pytest.raises(DyditError, match="do not fit"):
        open_data(tmp_path / "cache", geometry=small_flux(joint_attention_dim=16).geometry)


def test_prompts_alone_are_enough(tmp_path: Path) -> None:
    """The user's own pipeline draws the latents, each a function of the seed and its number."""
    from tests.flux_parts import stock_pipeline

    stock_pipeline(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a sneaker\n\na coat\n")
    values = {
        "data": None,
        "prompts": str(tmp_path / "prompts.txt"),
        "pipeline": str(tmp_path / "pipeline"),
        "steps": 2,
        "count": 5,
    }
    report = prepared(tmp_path / "a", **values, batch_size=2)
    assert (report.samples, report.texts) == (5, 2)
    prepared(tmp_path / "b", **values, batch_size=5)
    first, second = (open_data(tmp_path / name, geometry=GEOMETRY).train.source for name in "ab")  # type: ignore[attr-defined]
    torch.testing.assert_close(first.batch(range(5)), second.batch(range(5)), rtol=0, atol=1e-5)
    assert first.labels.tolist() == [0, 1, 0, 1, 0]
    assert read_index(tmp_path / "a").scale == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": None}, "data"),
        ({"prompts": "p.txt"}, "not both"),
        ({"pipeline": None}, "pipeline"),
        ({"resume": True, "overwrite": True}, "exclude"),
    ],
)
def test_sections_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    values = {"data": "pictures", "out": "cache", "pipeline": PIPELINE}
    with pytest.raises(ValueError, match=said):
        PrepareSection.model_validate(values | changes)
