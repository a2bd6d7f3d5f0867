"""Which inputs are taken: given ones, those of the manifest, those of the package, noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dydit_cli.artifacts import write_json
from dydit_cli.errors import DyditError
from dydit_cli.profiling.inputs import NoiseSource, data_of, find_inputs
from tests.tiny import tiny_model

PACKAGED_SHAPE = {
    "sample_size": 32,
    "patch_size": 8,
    "in_channels": 1,
    "hidden_size": 24,
    "num_layers": 1,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def latent():
    return tiny_model().geometry


@pytest.fixture(scope="module")
def packaged():
    return tiny_model(**PACKAGED_SHAPE).geometry


def latents(path: Path, count: int = 30) -> Path:
    np.savez(
        path, latents=np.zeros((count, 4, 8, 8), dtype=np.float32), labels=np.arange(count) % 10, scale=1.0
    )
    return path


def manifest(folder: Path, data: str | None, parent: Path | None = None) -> Path:
    folder.mkdir()
    content = {"schema": 1, "stage": "finetune", "settings": {"data": data}}
    content["parent"] = None if parent is None else {"path": str(parent)}
    write_json(folder / "manifest.json", content)
    return folder


def test_given_data_come_first(latent, own_folder: Path) -> None:
    model = manifest(own_folder / "t", str(latents(own_folder / "trained.npz")))
    found = find_inputs(latent, str(latents(own_folder / "given.npz", 50)), model, 4, 0)
    assert found.real
    assert found.data is not None
    assert found.data.endswith("given.npz")
    assert len(found.source) == 5
    assert "5 held-out samples" in found.note


def test_given_data_that_are_missing_are_an_error(latent, own_folder: Path) -> None:
    model = manifest(own_folder / "t", str(latents(own_folder / "trained.npz")))
    with pytest.raises(DyditError, match="no data"):
        find_inputs(latent, "missing.npz", model, 4, 0)


def test_the_data_of_the_manifest_come_next(latent, own_folder: Path) -> None:
    data = str(latents(own_folder / "trained.npz"))
    model = manifest(own_folder / "t", data)
    found = find_inputs(latent, None, model, 4, 0)
    assert (found.data, found.real, len(found.source)) == (data, True, 3)
    assert "trained on" in found.note


def test_the_manifest_of_a_parent_is_asked_too(own_folder: Path) -> None:
    data = str(latents(own_folder / "trained.npz"))
    trained = manifest(own_folder / "t", data)
    exported = manifest(own_folder / "e", None, trained)
    assert data_of(exported) == data
    assert data_of(manifest(own_folder / "x", None)) is None
    assert data_of(own_folder / "nothing") is None


@pytest.mark.parametrize("damaged", [False, True], ids=["gone", "damaged"])
def test_data_that_are_gone_or_spoilt_are_passed_over(latent, own_folder: Path, damaged: bool) -> None:
    model = manifest(own_folder / "t", str(own_folder / "trained.npz"))
    if damaged:
        (own_folder / "trained.npz").write_bytes(b"no zip")
    found = find_inputs(latent, None, model, 4, 0)
    assert not found.real
    assert "Noise instead of images" in found.note
    assert "--data" in found.note


def test_the_packaged_data_serve_a_model_that_they_fit(packaged) -> None:
    found = find_inputs(packaged, None, None, 4, 0)
    assert found.real
    assert found.data == "fashion-mnist-subset"
    assert len(found.source) == 1000


def test_noise_is_a_function_of_the_seed_and_the_index(latent) -> None:
    source, again, other = NoiseSource(latent, 5, 0), NoiseSource(latent, 9, 0), NoiseSource(latent, 5, 1)
    assert source.batch([3, 1]).shape == (2, 4, 8, 8)
    assert torch.equal(source.batch([3, 1])[1], again.sample(1)[0])
    assert not torch.equal(source.batch([1]), other.batch([1]))
    assert len(source) == 5
    assert int(source.labels.max()) < latent.num_classes
