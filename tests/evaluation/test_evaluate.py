"""Whole evaluations: the report, its files, pairs with yardsticks, and what is refused before anything is sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.evaluate import evaluate
from dydit_cli.evaluation.inputs.model import SamplingSettings
from dydit_cli.evaluation.report import ANOTHER_SEED, IN_BF16
from dydit_cli.evaluation.settings import EvaluationSettings
from dydit_cli.sampling.run import sample
from tests.evaluation.sources import archive, image_folder, pictures, saved_model

SAMPLING = SamplingSettings(num_images=12, steps=2, sampler="ddim", batch_size=4, device="cpu", seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Grey pictures of 32x32: faster than the packaged reference."""
    return str(archive(tmp_path_factory.mktemp("reference") / "r.npz", pictures(20, 9, 32, 1)))


def settings(reference: str | None = None, **changes: Any) -> EvaluationSettings:
    return EvaluationSettings(**{"sampling": SAMPLING, "reference": reference, **changes})


def test_a_models_report_says_everything(model: Path, reference: str, tmp_path: Path) -> None:
    done = evaluate(model, settings(reference, statistics=True), out=tmp_path / "e")
    content = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    made = content["subject"]["made_by"]
    assert (made["seed"], made["steps"], made["guidance"], made["sampler"]) == (5, 2, 1.5, "ddim")
    assert content["images"] == 12
    assert len(content["extractor"]["sha256"]) == 64
    assert content["device"].startswith("cpu")
    assert "torch" in content["versions"]
    for name in (
        "frechet",
        "spatial_frechet",
        "kernel",
        "inception_score",
        "precision",
        "recall",
        "accuracy",
    ):
        found = content["metrics"][name]
        assert found["low"] <= found["value"] <= found["high"], name
        assert found["method"]
    cost = content["cost"]
    assert 0 < cost["ratio"]["value"] < 1
    assert cost["mmacs"] < cost["static_mmacs"]
    assert cost["seconds_per_image"]["low"] is not None
    assert done.report.files == ["evaluation.json", "statistics.npz"]
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert (manifest["stage"], manifest["seed"]) == ("evaluate", 5)
    assert any("compare runs of the same number" in note for note in content["notes"])


def test_a_model_and_its_samples_score_the_same(model: Path, reference: str, tmp_path: Path) -> None:
    """The classes are found in the manifest."""
    sample(model, tmp_path / "s", num_images=12, steps=2, sampler="ddim", batch_size=4, device="cpu", seed=5)
    direct = evaluate(model, settings(reference)).report
    written = evaluate(tmp_path / "s", settings(reference)).report
    assert set(written.metrics) == set(direct.metrics)
    for name, measure in written.metrics.items():
        # The network sees other batches, and rounds otherwise.
        assert measure.value == pytest.approx(direct.metrics[name].value, rel=1e-5), name
    assert written.cost is None


def test_a_complete_model_against_itself_is_identical(model: Path, tmp_path: Path) -> None:
    whole = SamplingSettings(**{**vars(SAMPLING), "keep_bias": float("inf")})
    asked = EvaluationSettings(
        sampling=whole, against="static", yardstick_images=6, extractor="fashion-mnist", reference=None
    )
    done = evaluate(model, EvaluationSettings(**{**vars(asked), "reference": None}), out=tmp_path / "e")
    pairs = done.report.pairs
    assert pairs is not None
    # Compact and static execution round differently, by one step of 255 in some pixels at most.
    assert pairs.measures["psnr"].worst > 45
    assert pairs.measures["ssim"].worst > 0.99
    assert pairs.yardstick_count == 6
    seeds, halves = (pairs.yardsticks[name]["psnr"].mean.value for name in (ANOTHER_SEED, IN_BF16))
    assert seeds < halves
    for name in ("worst_pairs.png", "median_pairs.png"):
        assert (tmp_path / "e" / name).stat().st_size > 1000


def test_a_dynamic_model_against_its_static_form(model: Path, reference: str) -> None:
    asked = settings(reference, against=str(model), yardstick_images=0, fail_if=("psnr<100", "ssim>2"))
    done = evaluate(model, asked)
    assert done.report.pairs is not None
    assert done.report.pairs.measures["psnr"].mean.value < 60
    assert set(done.report.pairs.missing) == {ANOTHER_SEED, IN_BF16}
    assert [condition.text for condition, _ in done.failures] == ["psnr<100"]


def test_images_of_others_pair_without_a_network(tmp_path: Path) -> None:
    """Colour pictures of a size that the shipped network does not know: pairs alone."""
    ours = image_folder(tmp_path / "ours", pictures(4, 1, 16))
    theirs = archive(tmp_path / "theirs.npz", pictures(4, 1, 16))
    report = evaluate(ours, settings(against=str(theirs))).report
    assert report.pairs is not None
    assert report.pairs.measures["psnr"].worst == 100
    assert report.metrics == {}
    assert "--extractor" in report.missing["all distances"]
    assert len(report.pairs.missing) == 2


def test_samples_pair_with_a_model_by_their_manifest(model: Path, tmp_path: Path) -> None:
    """The seed, the steps and the classes are those of the samples, whatever the options' defaults are."""
    sample(
        model,
        tmp_path / "s",
        num_images=4,
        steps=2,
        sampler="ddim",
        device="cpu",
        seed=8,
        execution="static",
        classes=[3],
    )
    other = SamplingSettings(num_images=4, steps=50, device="cpu")
    asked = EvaluationSettings(sampling=other, against=str(model), yardstick_images=0)
    report = evaluate(tmp_path / "s", EvaluationSettings(**{**vars(asked), "reference": None})).report
    assert report.pairs is not None
    assert report.pairs.measures["psnr"].worst > 45


def test_pairs_that_are_none(tmp_path: Path) -> None:
    few = image_folder(tmp_path / "a", pictures(3, 1, 16))
    many = image_folder(tmp_path / "b", pictures(4, 1, 16))
    with pytest.raises(DyditError, match="cannot be paired"):
        evaluate(few, settings(against=str(many)))


def test_videos(tmp_path: Path) -> None:
    videos = torch.nn.functional.pad(pictures(6, 1, 28, 1, frames=3), (0, 0, 2, 2, 2, 2))
    path = archive(tmp_path / "v.npz", videos, arr_1=np.arange(6))
    report = evaluate(path, settings(str(path))).report
    assert (report.images, report.videos) == (18, 6)
    assert report.metrics["temporal_frechet"].value == pytest.approx(0, abs=1e-4)
    assert report.metrics["frechet"].value == pytest.approx(0, abs=1e-4)
    assert "accuracy" in report.metrics


def test_a_model_is_no_reference(model: Path) -> None:
    with pytest.raises(DyditError, match="is a model"):
        evaluate(model, settings(str(model)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fail_if": ("psrn<1",)}, "no metric called"),
        ({"fail_if": ("psnr<1",)}, "needs pairs"),
        ({"lpips": "x"}, "without --against"),
        ({"fail_if": ("lpips>0.3",), "against": "static"}, "no --lpips is given"),
        ({"clip": "x", "against": "static"}, "needs prompts"),
        ({"statistics": True}, "nowhere to go"),
        ({"extractor": "nowhere.pth"}, "no weights' file"),
        ({"against": "nowhere"}, "nothing to evaluate at nowhere"),
        ({"reference": "nowhere"}, "nothing to evaluate at nowhere"),
        ({"against": "static", "lpips": "nowhere"}, "does not hold LPIPS"),
    ],
)
def test_mistakes_come_before_the_sampling(model: Path, changes: dict[str, Any], said: str) -> None:
    def sampled(what: str, done: float, total: int) -> None:
        raise AssertionError(f"{what} were made")

    with pytest.raises(DyditError, match=said):
        evaluate(model, settings(**changes), on_progress=sampled)


def test_an_image_the_network_cannot_judge_is_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "i", pictures(3, 1, 16))
    with pytest.raises(DyditError, match="cannot judge images of 16x16"):
        evaluate(folder, settings())
    one = image_folder(tmp_path / "one", pictures(1, 1, 32, 1))
    with pytest.raises(DyditError, match="One image"):
        evaluate(one, settings(str(archive(tmp_path / "r.npz", pictures(5, 1, 32, 1)))))
