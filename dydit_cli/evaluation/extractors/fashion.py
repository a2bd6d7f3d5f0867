"""The shipped Fashion-MNIST network as an extractor, with its reference statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.extractors.extractor import Features, on_cpu
from dydit_cli.evaluation.extractors.fashion_network import (
    FEATURE_SIZE,
    NUM_CLASSES,
    SPATIAL_SIZE,
    FashionNetwork,
    padded,
)

NAME = "fashion-mnist"
SIZES = (28, 32)


@dataclass(frozen=True)
class FashionExtractor:
    """See `Extractor`."""

    network: FashionNetwork
    sha256: str
    device: torch.device
    test_accuracy: float
    name: str = NAME
    classes: int | None = NUM_CLASSES

    @property
    def title(self) -> str:
        """For people."""
        return f"dydit's Fashion-MNIST network ({self.test_accuracy:.1%} accurate on the test images)"

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """See `Extractor`."""
        height, width = images.shape[1:3]
        grey = images[..., 0]
        if height != width or height not in SIZES or not bool((images == grey[..., None]).all()):
            raise DyditError(
                f"The Fashion-MNIST network cannot judge images of {height}x{width}"
                + (" in colour." if height in SIZES else "."),
                why="It was trained on grey images of 28x28, padded to 32x32.",
                fix="Pass --extractor with a local Inception weights' file, which takes any image.",
            )
        return on_cpu(*self.network(padded(grey.to(self.device))))

    def describe(self) -> dict[str, Any]:
        """See `Extractor`."""
        return {
            "name": self.name,
            "file": "packaged",
            "sha256": self.sha256,
            "feature_size": FEATURE_SIZE,
            "spatial_size": SPATIAL_SIZE,
            "test_accuracy": self.test_accuracy,
        }


def open_fashion(device: torch.device) -> FashionExtractor:
    """Load the packaged network.

    Raises:
        DyditError: If its file is not the one that was shipped.
    """
    record = _record()
    path = _checked(record["weights"])
    network = FashionNetwork()
    network.load_state_dict(load_file(path))
    network.eval().requires_grad_(False).to(device)
    return FashionExtractor(network, record["weights"]["sha256"], device, float(record["test_accuracy"]))


def fashion_statistics() -> Path:
    """The packaged statistics of the 60,000 training images.

    Raises:
        DyditError: If the file is not the one that was shipped.
    """
    return _checked(_record()["statistics"])


def _folder() -> Path:
    return Path(str(files("dydit_cli"))) / "assets" / "evaluation"


def _record() -> dict[str, Any]:
    return dict(json.loads((_folder() / "evaluation.json").read_text(encoding="utf-8")))


def _checked(entry: dict[str, Any]) -> Path:
    path = _folder() / str(entry["file"])
    if not path.is_file() or file_hash(path) != entry["sha256"]:
        raise DyditError(
            f"The packaged file {path} is not the one that was shipped.",
            why="Its SHA-256 differs from the recorded one, or it is missing; results would not be comparable.",
            fix="Install dydit again.",
        )
    return path
