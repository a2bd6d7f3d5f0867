"""All metrics of a set, references of every kind, and what is said of metrics that cannot be measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.collecting import Collected, collect
from dydit_cli.evaluation.extractors.fashion import fashion_statistics, open_fashion
from dydit_cli.evaluation.inputs.archive import open_archive
from dydit_cli.evaluation.inputs.idx import open_idx, packaged_subset
from dydit_cli.evaluation.metrics.frechet import frechet_distance
from dydit_cli.evaluation.metrics.moments import Moments, moments_of
from dydit_cli.evaluation.reference import open_reference, write_statistics
from dydit_cli.evaluation.scoring import METRICS, NO_FEATURES, NO_REFERENCE, TEMPORAL, score
from tests.evaluation.sources import Means, archive, pictures, silent


def found(path: Path, extractor: Means | None = None) -> Collected:
    return collect(open_archive(path), extractor or Means())


def test_images_against_images(tmp_path: Path) -> None:
    samples = archive(tmp_path / "s.npz", pictures(30, 1), arr_1=np.arange(30) % 4)
    reference = open_reference(str(archive(tmp_path / "r.npz", pictures(40, 2))), Means(), silent)
    scores = score(found(samples), Means(), reference)
    assert set(scores.values) == set(METRICS) - {TEMPORAL}
    assert not scores.missing
    features = [Means().features(pictures(count, seed)).pooled for count, seed in ((30, 1), (40, 2))]
    expected = frechet_distance(*map(moments_of, features))
    assert scores.values["frechet"].value == pytest.approx(expected, rel=1e-6)


def test_written_statistics_give_the_same_distance(tmp_path: Path) -> None:
    reference = archive(tmp_path / "r.npz", pictures(40, 2))
    write_statistics(tmp_path / "stats.npz", found(reference), Means())
    samples = found(archive(tmp_path / "s.npz", pictures(30, 1)))
    by_file = score(samples, Means(), open_reference(str(tmp_path / "stats.npz"), Means(), silent))
    by_images = score(samples, Means(), open_reference(str(reference), Means(), silent))
    for name in ("frechet", "spatial_frechet"):
        assert by_file.values[name].value == pytest.approx(by_images.values[name].value, rel=1e-9)
    assert by_file.missing["kernel"] == NO_FEATURES
    assert by_file.missing["accuracy"] == "the classes of the samples are not known"


def test_the_forms_of_pytorch_fid_and_adm(tmp_path: Path) -> None:
    features = Means().features(pictures(40, 2))
    arrays = {}
    for suffix, values in (("", features.pooled), ("_s", features.spatial)):
        moments = moments_of(values)
        arrays |= {f"mu{suffix}": moments.mean.numpy(), f"sigma{suffix}": moments.covariance.numpy()}
    np.savez(tmp_path / "fid.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    np.savez(tmp_path / "adm.npz", arr_0=pictures(40, 2).numpy(), **arrays)
    samples = found(archive(tmp_path / "s.npz", pictures(30, 1)))
    simple = score(samples, Means(), open_reference(str(tmp_path / "fid.npz"), Means(), silent))
    assert "mu_s" in simple.missing["spatial_frechet"]
    rich = score(samples, Means(), open_reference(str(tmp_path / "adm.npz"), Means(), silent))
    assert {"kernel", "precision", "spatial_frechet"} <= set(rich.values)
    assert rich.values["frechet"].value == pytest.approx(simple.values["frechet"].value)


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    samples = found(archive(tmp_path / "s.npz", pictures(30, 1)))
    write_statistics(tmp_path / "stats.npz", samples, Means(sha256="cd" * 32))
    with pytest.raises(DyditError, match="another network"):
        open_reference(str(tmp_path / "stats.npz"), Means(), silent)
    np.savez(tmp_path / "large.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(DyditError, match="do not fit"):
        open_reference(str(tmp_path / "large.npz"), Means(), silent)
    np.savez(tmp_path / "half.npz", mu=np.zeros(6))
    with pytest.raises(DyditError, match="no complete statistics"):
        open_reference(str(tmp_path / "half.npz"), Means(), silent)
    np.savez(tmp_path / "nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    with pytest.raises(DyditError, match="not finite"):
        open_reference(str(tmp_path / "nan.npz"), Means(), silent)
    with pytest.raises(DyditError, match="does not fit the network"):
        open_reference("fashion-mnist", Means(), silent)


def test_without_a_reference_the_reasons_are_given(tmp_path: Path) -> None:
    scores = score(found(archive(tmp_path / "s.npz", pictures(5, 1))), Means(classes=None), None)
    assert set(scores.values) == {"inception_score"}
    assert scores.missing["frechet"] == NO_REFERENCE
    assert "network's classes" in scores.missing["accuracy"]


def test_videos_have_a_temporal_distance_that_sees_the_order(tmp_path: Path) -> None:
    """Frames in another order are the same images: only the temporal distance tells."""
    ramp = torch.arange(8).view(1, 8, 1, 1, 1)
    steady = (pictures(12, 1, frames=1).int() // 2 + 12 * ramp).to(torch.uint8)
    shuffled = steady[:, [3, 0, 6, 1, 7, 4, 2, 5]]
    reference = open_reference(str(archive(tmp_path / "r.npz", steady)), Means(), silent)
    scores = {
        name: score(found(archive(tmp_path / f"{name}.npz", videos)), Means(), reference).values
        for name, videos in (("same", steady), ("shuffled", shuffled))
    }
    assert scores["shuffled"]["frechet"].value == pytest.approx(scores["same"]["frechet"].value, abs=1e-4)
    assert scores["same"][TEMPORAL].value == pytest.approx(0, abs=1e-5)
    assert scores["shuffled"][TEMPORAL].value > 0.01


def test_videos_against_images_have_none(tmp_path: Path) -> None:
    reference = open_reference(str(archive(tmp_path / "r.npz", pictures(30, 2))), Means(), silent)
    scores = score(found(archive(tmp_path / "v.npz", pictures(6, 1, frames=4))), Means(), reference)
    assert "consecutive" in scores.missing[TEMPORAL]
    assert "frechet" in scores.values


def test_the_shipped_network_and_its_statistics() -> None:
    """Real images score well, and the statistics are those of the network that is shipped."""
    extractor = open_fashion(torch.device("cpu"))
    assert extractor.test_accuracy >= 0.91
    found = collect(open_idx(packaged_subset(), 2000), extractor)
    assert found.features is not None
    with np.load(fashion_statistics()) as stored:
        assert int(stored["count"]) == 60000
        reference = Moments(torch.from_numpy(stored["mu"]), torch.from_numpy(stored["sigma"]), 60000)
    own = frechet_distance(moments_of(found.features.pooled), reference)
    noise = extractor.features(pictures(200, 1, 32, 1).expand(-1, -1, -1, 3))
    assert own < 0.3
    assert frechet_distance(moments_of(noise.pooled), reference) > 100 * own


def test_the_shipped_network_pads_and_refuses() -> None:
    extractor = open_fashion(torch.device("cpu"))
    small = pictures(2, 1, 28, 1)
    padded = torch.nn.functional.pad(small, (0, 0, 2, 2, 2, 2))
    assert torch.equal(extractor.features(small).pooled, extractor.features(padded).pooled)
    with pytest.raises(DyditError, match="64x64") as caught:
        extractor.features(pictures(1, 1, 64, 1))
    assert "--extractor" in caught.value.fix
    with pytest.raises(DyditError, match="in colour"):
        extractor.features(pictures(1, 1, 32, 3))


def test_the_shipped_network_knows_the_classes(repository: Path) -> None:
    """Accuracy on the packaged test images is near the recorded one."""
    from dydit_cli.data.idx import read_idx

    folder = repository / "dydit_cli" / "assets" / "fashion-mnist"
    extractor = open_fashion(torch.device("cpu"))
    images = torch.from_numpy(read_idx(folder / "t10k-images-idx3-ubyte.gz", 3).copy())[..., None]
    labels = torch.from_numpy(read_idx(folder / "t10k-labels-idx1-ubyte.gz", 1).astype(np.int64))
    right = torch.cat([extractor.features(part).logits.argmax(dim=1) for part in images.split(250)]) == labels
    assert float(right.double().mean()) == pytest.approx(extractor.test_accuracy, abs=0.025)
