"""The batch of a step depends on (seed, step) alone, and the held-out samples never appear in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dydit_cli.data import TrainingBatches, open_data
from dydit_cli.data.folder import ImageFolder
from dydit_cli.data.held_out import split
from dydit_cli.data.images import ArrayImages
from dydit_cli.data.mirror import MirrorRule
from dydit_cli.errors import DyditError
from tests.data.test_open_data import COLOUR, image_folder


def numbered(count: int, classes: int = 3) -> ArrayImages:
    """Image i has the value i in its left half and 255 in its right half."""
    images = np.full((count, 1, 4, 4), 255, dtype=np.uint8)
    images[:, 0, :, :2] = np.arange(count)[:, None, None]
    return ArrayImages(images, torch.arange(count) % classes, padding=0, kind="test", path=Path())


def identities(clean: torch.Tensor) -> list[int]:
    return [round((float(sample.min()) + 1) * 127.5) for sample in clean]


def test_an_epoch_shows_every_sample_once_and_batches_straddle_epochs() -> None:
    batches = TrainingBatches(numbered(10), 4, seed=0, mirror=MirrorRule(False))
    stream = [identity for step in range(5) for identity in identities(batches.at(step).clean)]
    assert sorted(stream[:10]) == list(range(10))
    assert sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    rule = MirrorRule(True)
    straight = TrainingBatches(numbered(10), 4, seed=3, mirror=rule)
    for step in range(6):
        straight.at(step)
    resumed = TrainingBatches(numbered(10), 4, seed=3, mirror=rule)
    assert torch.equal(straight.at(6).clean, resumed.at(6).clean)
    assert torch.equal(straight.at(2).clean, resumed.at(2).clean), "also backwards"
    other = TrainingBatches(numbered(10), 4, seed=4, mirror=rule)
    assert not torch.equal(other.at(6).clean, resumed.at(6).clean)


def test_mirroring_takes_half_and_spares_the_classes_named() -> None:
    batches = TrainingBatches(numbered(90), 90, seed=0, mirror=MirrorRule(True, frozenset([1])))
    batch = batches.at(0)
    mirrored = batch.clean[:, 0, 0, 0] > batch.clean[:, 0, 0, 3]
    assert not bool(mirrored[batch.condition == 1].any())
    assert 0.25 < float(mirrored[batch.condition != 1].float().mean()) < 0.75


def test_workers_give_the_batches_of_one_process() -> None:
    batches = TrainingBatches(numbered(10), 4, seed=0, mirror=MirrorRule(True))
    read = list(batches.between(2, 5, num_workers=2))
    for step, batch in zip(range(2, 5), read, strict=True):
        assert torch.equal(batch.clean, batches.at(step).clean)
        assert torch.equal(batch.condition, batches.at(step).condition)


def test_an_error_keeps_its_three_parts_on_the_way_out_of_a_worker(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, per_class=2)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"not an image")
    batches = TrainingBatches(ImageFolder(folder, COLOUR), 2, seed=0, mirror=MirrorRule(False))
    with pytest.raises(DyditError, match="cannot be read") as caught:
        list(batches.between(0, 1, num_workers=1))
    assert "remove it" in caught.value.fix


def test_hold_out_is_stratified_stable_and_bounded() -> None:
    source = numbered(200, classes=5)
    train, held_out = split(source)
    assert torch.bincount(source.labels[held_out]).tolist() == [4] * 5
    assert not set(train.tolist()) & set(held_out.tolist())
    assert len(train) + len(held_out) == 200
    assert torch.equal(split(source)[1], held_out)
    assert len(split(numbered(20000))[1]) == 1000
    assert len(split(numbered(2))[1]) == 1


def test_hold_out_of_a_folder_follows_the_files_not_their_number(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, per_class=20, size=(8, 8))

    def held_out_names() -> set[str]:
        source = open_data(folder, geometry=COLOUR).held_out
        return {source.key(index) for index in range(len(source))}

    before = held_out_names()
    Image.new("RGB", (8, 8)).save(folder / "ant" / "aaa.png")
    assert len(before & held_out_names()) >= len(before) - 1
