"""What samples are compared with: statistics of a file, or features of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dydit_cli.artifacts import atomic_write
from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.collecting import Collected, Progress, collect
from dydit_cli.evaluation.extractors.extractor import Extractor, Features
from dydit_cli.evaluation.extractors.fashion import NAME as FASHION
from dydit_cli.evaluation.extractors.fashion import fashion_statistics
from dydit_cli.evaluation.inputs.archive import NAMES, names_in, open_archive, read_arrays
from dydit_cli.evaluation.inputs.idx import open_idx, packaged_subset
from dydit_cli.evaluation.inputs.kinds import is_model
from dydit_cli.evaluation.inputs.model import SamplingSettings
from dydit_cli.evaluation.inputs.opening import open_source
from dydit_cli.evaluation.inputs.source import ImageSource
from dydit_cli.evaluation.metrics.moments import Moments, moments_of
from dydit_cli.processes.world import ALONE, World


@dataclass(frozen=True)
class Reference:
    """What the metrics need of it; what is None cannot be measured against.

    Attributes:
        pooled: Moments of pooled features.
        spatial: Moments of spatial features.
        temporal: Moments of feature differences between consecutive frames.
        features: Features of images, for the kernel distance, precision and recall.
        facts: For the report.
    """

    pooled: Moments
    spatial: Moments | None
    temporal: Moments | None
    features: Features | None
    facts: dict[str, Any] = field(default_factory=dict)


def open_reference(
    name: str, extractor: Extractor, on_progress: Progress, videos: bool = False, world: World = ALONE
) -> Reference:
    """Open a reference.

    * ``fashion-mnist``: packaged statistics of the 60,000 training images; the packaged 10,000 of them serve the metrics that
      need features.
    * An .npz with ``mu`` and ``sigma`` (pytorch-fid's form; ADM's has ``mu_s`` and ``sigma_s`` as well, and images).
    * Anything else that holds images or videos.

    Args:
        name: One of these.
        extractor: The network.
        on_progress: See `Progress`.
        videos: See `open_source`.
        world: Processes that share its images.

    Raises:
        DyditError: If it is not there, damaged, or made with another network.
    """
    if name == FASHION:
        return _packaged(extractor, on_progress, world)
    path = Path(name).expanduser()
    if _is_statistics(path):
        return _statistics(path, extractor, on_progress, world)
    source = _images(path, videos)
    found = collect(source, extractor, what="reference", on_progress=on_progress, world=world)
    return _of_images(found, source.describe())


def check_reference(name: str, extractor: Extractor, videos: bool = False) -> None:
    """See that a reference is there and fits, without a look at its images. The arguments are those of `open_reference`.

    Raises:
        DyditError: As `open_reference`.
    """
    path = Path(name).expanduser()
    if name == FASHION:
        _refuse_packaged(extractor)
    elif _is_statistics(path):
        _read(path, extractor)
    else:
        _images(path, videos)


def _is_statistics(path: Path) -> bool:
    return path.suffix == ".npz" and "mu" in names_in(path)


def _images(path: Path, videos: bool) -> ImageSource:
    if is_model(path):
        raise DyditError(
            f"The reference {path} is a model.",
            why="A reference is data, or statistics of data.",
            fix="Pass real images; to compare with a model's images, write them with `dydit sample` first, or use --against.",
        )
    return open_source(path, SamplingSettings(), videos=videos)


def _refuse_packaged(extractor: Extractor) -> None:
    if extractor.name != FASHION:
        raise DyditError(
            "The packaged reference does not fit the network.",
            why=f"Its statistics are those of the Fashion-MNIST network's features; the network is {extractor.title}.",
            fix="Pass --reference with statistics or images of your data.",
        )


def _packaged(extractor: Extractor, on_progress: Progress, world: World) -> Reference:
    _refuse_packaged(extractor)
    path = fashion_statistics()
    pooled, spatial, _ = _read(path, extractor)
    images = open_idx(packaged_subset())
    found = collect(images, extractor, what="reference", on_progress=on_progress, world=world)
    facts = {
        "kind": "packaged statistics",
        "path": FASHION,
        "sha256": file_hash(path),
        "images": pooled.count,
        "images_with_features": found.count,
    }
    return Reference(pooled, spatial, None, found.features, facts)


def _statistics(path: Path, extractor: Extractor, on_progress: Progress, world: World) -> Reference:
    pooled, spatial, temporal = _read(path, extractor)
    facts = {"kind": "statistics", "path": str(path), "sha256": file_hash(path), "images": pooled.count}
    features = None
    if any(name in names_in(path) for name in NAMES):
        images = open_archive(path)
        found = collect(images, extractor, what="reference", on_progress=on_progress, world=world)
        features = found.features
        facts["images_with_features"] = found.count
    return Reference(pooled, spatial, temporal, features, facts)


def _of_images(found: Collected, facts: dict[str, Any]) -> Reference:
    features = found.features
    if features is None or len(features) < 2:
        raise DyditError(
            "The reference has too few images.",
            why=f"It has {found.count}; a covariance needs 2 at least, and a useful one thousands.",
            fix="Pass --reference a larger set.",
        )
    steps = found.steps_between_frames
    return Reference(
        moments_of(features.pooled),
        moments_of(features.spatial),
        None if steps is None else moments_of(steps.flatten(0, 1)),
        features,
        facts,
    )


def _read(path: Path, extractor: Extractor) -> tuple[Moments, Moments | None, Moments | None]:
    names = ("mu", "sigma", "mu_s", "sigma_s", "mu_t", "sigma_t", "count", "extractor_sha256")
    arrays = read_arrays(path, names)
    made_with = str(arrays["extractor_sha256"]) if "extractor_sha256" in arrays else extractor.sha256
    if made_with != extractor.sha256:
        raise DyditError(
            f"The statistics in {path} were made with another network.",
            why=f"They name weights {made_with[:12]}…, the network has {extractor.sha256[:12]}….",
            fix="Pass the --extractor that they were made with, or make them anew from images.",
        )
    count = int(arrays["count"]) if "count" in arrays else None
    sizes = extractor.describe()
    pooled = _moments(path, arrays, "", int(sizes["feature_size"]), count)
    if pooled is None:
        raise DyditError(
            f"{path} holds no complete statistics.",
            why="It has a 'mu' and no 'sigma'.",
            fix="Write both, as pytorch-fid's --save-stats does.",
        )
    spatial = _moments(path, arrays, "_s", int(sizes["spatial_size"]), count)
    return pooled, spatial, _moments(path, arrays, "_t", int(sizes["feature_size"]), count)


def _moments(
    path: Path, arrays: dict[str, NDArray[Any]], suffix: str, size: int, count: int | None
) -> Moments | None:
    mean, covariance = arrays.get(f"mu{suffix}"), arrays.get(f"sigma{suffix}")
    if mean is None or covariance is None:
        return None
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise DyditError(
            f"The statistics in {path} do not fit the network.",
            why=f"mu{suffix} has shape {mean.shape} and sigma{suffix} {covariance.shape}; the network's features have {size}.",
            fix="Pass the --extractor that they were made with.",
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DyditError(
            f"The statistics in {path} are not finite.",
            why=f"mu{suffix} or sigma{suffix} holds values that are no numbers.",
            fix="Make them anew.",
        )
    return Moments(
        torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)), count
    )


def write_statistics(path: Path, found: Collected, extractor: Extractor) -> None:
    """Write the moments of a pass as an .npz that `open_reference`, pytorch-fid and ADM's evaluation read."""
    if found.features is None:
        raise TypeError("a pass without features has no statistics")
    sets = {"": found.features.pooled, "_s": found.features.spatial}
    if (steps := found.steps_between_frames) is not None:
        sets["_t"] = steps.flatten(0, 1)
    arrays: dict[str, Any] = {
        "count": np.int64(len(found.features)),
        "extractor_sha256": np.str_(extractor.sha256),
    }
    for suffix, values in sets.items():
        moments = moments_of(values)
        arrays |= {f"mu{suffix}": moments.mean.numpy(), f"sigma{suffix}": moments.covariance.numpy()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
