"""Sampling and evaluation in several processes: the bytes and numbers of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dydit_cli.cli.app import main
from dydit_cli.data import open_data
from dydit_cli.evaluation.collecting import Collected, collect
from dydit_cli.evaluation.extractors.extractor import Features
from dydit_cli.evaluation.inputs.archive import ArchiveImages
from dydit_cli.objectives import HeldOutDraws, measure, objective_of
from dydit_cli.processes.world import ALONE, World
from dydit_cli.sampling.generate import generate
from dydit_cli.sampling.run import write_all
from dydit_cli.sampling.writing import SampleWriter
from tests.objectives.base_models import tiny_model
from tests.processes.threads import together
from tests.training.runs import settings_for


def undecided() -> Any:
    """A compact model whose masks differ from image to image."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_router." in name and name.endswith("bias"):
                parameter.fill_(0.3)
    return model.eval().set_execution("compact")


def draw(model: Any, folder: Path, world: World) -> tuple[float, int]:
    """Write seven images in batches of two; return the sums that a report is made of."""
    if world.is_first:
        folder.mkdir()
    writer = SampleWriter(folder, 7, [0] * 7)
    with writer:
        batches = generate(model, num_images=7, batch_size=2, steps=3, world=world)
        totals = write_all(batches, -(-4 // world.size), writer, world)
    return totals.ratios, totals.evaluations


@pytest.mark.parametrize("processes", [2, 3])
def test_files_are_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path, processes: int) -> None:
    # Made one after the other: the generator of new weights is the process's, and an executor is not for several threads.
    models = [undecided() for _ in range(processes)]
    alone = draw(undecided(), tmp_path / "one", ALONE)
    shared = together(processes, lambda world: draw(models[world.rank], tmp_path / "shared", world))
    one, several = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*.*"))
        }
        for name in ("one", "shared")
    )
    assert len(one) == 9
    assert one == several
    for ratios, evaluations in shared:
        assert ratios == pytest.approx(alone[0])
        assert evaluations == alone[1] == 21


class Means:
    """A network that says the mean of an image."""

    classes = None

    def features(self, images: Tensor) -> Features:
        pooled = images.flatten(1).float().mean(dim=1, keepdim=True)
        return Features(pooled, pooled * 2, pooled * 3)


def test_features_and_images_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dydit_cli.evaluation.collecting.FEATURE_BATCH", 4)
    images = np.arange(18 * 4, dtype=np.uint8).reshape(18, 2, 2, 1)
    source = ArchiveImages(Path("x.npz"), images, list(range(18)))

    def collected(world: World) -> Collected:
        return collect(source, Means(), keep_images=True, world=world)  # type: ignore[arg-type]

    alone = collected(ALONE)
    assert alone.count == 18
    for shared in together(3, collected):
        assert shared.count == 18
        assert shared.images is not None
        assert torch.equal(shared.images, torch.from_numpy(images))
        assert shared.features is not None
        assert alone.features is not None
        assert torch.equal(shared.features.pooled, alone.features.pooled)
        assert torch.equal(shared.features.logits, alone.features.logits)


def test_a_measurement_is_shared_and_everyone_has_it(tmp_path: Path) -> None:
    """Five samples at fifty timesteps: batches of one sample, of which most processes have none."""
    settings, models = settings_for(tmp_path), [tiny_model() for _ in range(4)]
    model = models[3]
    data = open_data(settings.data, geometry=model.geometry)
    draws = HeldOutDraws(data.held_out, objective_of(model), images=5, timesteps=6)
    alone = measure(model, draws)
    for shared in together(3, lambda world: measure(models[world.rank], draws, world=world)):
        assert shared.ratio == pytest.approx(alone.ratio, abs=1e-9)
        assert shared.losses["loss"] == pytest.approx(alone.losses["loss"], rel=1e-5)
        assert [at.t for at in shared.per_timestep] == [at.t for at in alone.per_timestep]


@pytest.mark.slow
def test_sampling_in_two_real_processes(tmp_path: Path) -> None:
    model = settings_for(tmp_path).model
    for name, processes in (("one", 1), ("two", 2)):
        words = ["sample", "--model", model, "--num-images", "7", "--steps", "3", "--device", "cpu"]
        more = ["--batch-size", "2", "--out", str(tmp_path / name), "--processes", str(processes)]
        assert main([*words, *more]) == 0
    for path in sorted((tmp_path / "one" / "images").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "images" / path.name).read_bytes()
    archives = [(tmp_path / name / "samples.npz").read_bytes() for name in ("one", "two")]
    assert archives[0] == archives[1]
