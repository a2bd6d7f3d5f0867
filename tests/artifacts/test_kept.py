"""Artifacts and recipes of earlier versions load and compute what they did (`scripts/keep.py` keeps them; they are never made anew)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.artifacts import load_for_training, load_model, read_manifest
from dydit_cli.inspection.inspect import inspect
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import SECTIONS
from tests.tiny import relative_difference

KEPT = sorted((Path(__file__).resolve().parent.parent / "kept").iterdir())
LARGEST = 200_000

each_version = pytest.mark.parametrize("kept", KEPT, ids=[path.name for path in KEPT])


def test_something_is_kept() -> None:
    assert [path.name for path in KEPT]


@each_version
@pytest.mark.parametrize("execution", ["dense", "compact"])
def test_an_artifact_computes_what_it_did(kept: Path, execution: str) -> None:
    expected = load_file(kept / "expected.safetensors")
    model = load_model(kept / "artifact", execution=execution)
    with torch.no_grad():
        prediction, routing = model.denoise(expected["samples"], expected["times"], expected["labels"])
    for name in ("heads", "groups", "tokens"):
        masks = getattr(routing, name)
        assert torch.equal(masks, expected[name]), name
        assert 0 < float(masks.mean()) < 1
    assert relative_difference(prediction, expected["prediction"]) < 1e-5


@each_version
def test_an_artifact_can_be_read_and_trained(kept: Path) -> None:
    manifest = read_manifest(kept / "artifact")
    assert manifest["stage"] == "convert"
    assert load_for_training(kept / "artifact").training
    found = inspect(kept / "artifact")
    assert found.problem is None
    assert found.keys is not None
    assert found.keys.lost == found.keys.missing == ()
    json.dumps(found.as_json())


@each_version
def test_a_recipe_with_every_key_is_still_valid(kept: Path) -> None:
    recipe = load_recipe(str(kept / "recipe.yaml"))
    assert set(recipe.sections) == set(SECTIONS)


@each_version
def test_what_is_kept_is_small(kept: Path) -> None:
    assert sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()) < LARGEST
