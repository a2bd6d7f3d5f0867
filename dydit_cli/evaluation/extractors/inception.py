"""Inception features from a local weights' file, as users of pytorch-fid or torch-fidelity have it. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError
from dydit_cli.evaluation.extractors.extractor import Features, on_cpu
from dydit_cli.evaluation.extractors.inception_network import FEATURE_SIZE, SPATIAL_SIZE, InceptionNetwork
from dydit_cli.evaluation.extractors.resizing import PYTORCH_FID, TENSORFLOW, prepared

FILES = {
    "pt_inception-2015-12-05-6726825d.pth": PYTORCH_FID,
    "weights-inception-2015-12-05-6726825d.pth": TENSORFLOW,
}
"""The published files, and the resizing of the program that each belongs to. Their weights are those of one network."""

BRING = (
    "Bring the file of pytorch-fid (pt_inception-2015-12-05-6726825d.pth, a release file of mseitzer/pytorch-fid) or of "
    "torch-fidelity (weights-inception-2015-12-05-6726825d.pth, of toshas/torch-fidelity) and pass its path with --extractor."
)


@dataclass(frozen=True)
class InceptionExtractor:
    """See `Extractor`."""

    network: InceptionNetwork
    path: Path
    sha256: str
    resize: str
    device: torch.device
    classes: int | None = None

    @property
    def name(self) -> str:
        """The resizing is part of it: features differ by it."""
        return f"inception-v3 ({self.resize} resizing)"

    @property
    def title(self) -> str:
        """For people."""
        return f"Inception-v3 (2015-12-05), resized as {self.resize} does"

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """See `Extractor`."""
        return on_cpu(*self.network(prepared(images.to(self.device), self.resize)))

    def describe(self) -> dict[str, Any]:
        """See `Extractor`."""
        return {
            "name": self.name,
            "file": str(self.path),
            "sha256": self.sha256,
            "resize": self.resize,
            "feature_size": FEATURE_SIZE,
            "spatial_size": SPATIAL_SIZE,
        }


def open_inception(path: Path, resize: str, device: torch.device) -> InceptionExtractor:
    """Read the network's weights.

    Args:
        path: The file.
        resize: ``tensorflow``, ``pytorch-fid``, or ``auto``: that of the program whose file's name it bears, else
            TensorFlow's, on which the published reference statistics rest.
        device: Where to run.

    Raises:
        DyditError: If there is no such file, or it does not hold this network and nothing else.
    """
    if not path.is_file():
        raise DyditError(
            f"There is no weights' file at {path}.", why="Nothing is downloaded in secret.", fix=BRING
        )
    tensors = dict(read_checkpoint(path).tensors)
    network = InceptionNetwork()
    _check_fit(network, tensors, path)
    network.load_state_dict(tensors, strict=False)
    network.eval().requires_grad_(False).to(device)
    chosen = FILES.get(path.name, TENSORFLOW) if resize == "auto" else resize
    return InceptionExtractor(network, path, file_hash(path), chosen, device)


def _check_fit(network: InceptionNetwork, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless the file's keys and shapes are the network's; counters of batches may be absent, as older files have none."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - counters - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    other = sorted(
        name for name in set(expected) & set(tensors) if tuple(tensors[name].shape) != expected[name]
    )
    faults = [
        f"{len(names)} {what} ({', '.join(names[:3])})"
        for what, names in (("missing", missing), ("unknown", unexpected), ("of another shape", other))
        if names
    ]
    if not faults:
        return
    classifier = any(name.startswith("AuxLogits.") for name in tensors) or tensors.get(
        "fc.weight", torch.empty(0)
    ).shape == (1000, FEATURE_SIZE)
    why = f"Of its tensors, {'; '.join(faults)}."
    if classifier:
        why += " It looks like torchvision's ImageNet classifier, whose features give other distances."
    raise DyditError(f"{path} is not the Inception network of Fréchet distances.", why=why, fix=BRING)
