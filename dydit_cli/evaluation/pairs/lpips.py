"""LPIPS with AlexNet, version 0.1 (Zhang et al., arXiv 1801.03924), from two local files: the trunk and the linear heads.

Source of the layout: https://github.com/richzhang/PerceptualSimilarity (``alex.pth``: `lin0.model.1.weight` …) and torchvision's
``alexnet-owt-7be5be79.pth`` (`features.0.weight` …).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError

# Key of the trunk's convolution, output channels, input channels, kernel, stride, padding, and whether a pool stands before it.
CONVOLUTIONS = (
    ("features.0", 64, 3, 11, 4, 2, False),
    ("features.3", 192, 64, 5, 1, 2, True),
    ("features.6", 384, 192, 3, 1, 1, True),
    ("features.8", 256, 384, 3, 1, 1, False),
    ("features.10", 256, 256, 3, 1, 1, False),
)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10
SMALLEST = 32
"""Below it the last pool has nothing left."""

BRING = (
    "Pass --lpips a folder with alexnet-owt-7be5be79.pth (torchvision's AlexNet) and alex.pth (lpips/weights/v0.1 of "
    "richzhang/PerceptualSimilarity)."
)


@dataclass(frozen=True)
class Lpips:
    """The distance; 0 for identical images.

    Attributes:
        trunk: (weight, bias) of each convolution.
        heads: (1, C, 1, 1) of each.
        sha256: Of the heads' and of the trunk's file.
    """

    trunk: tuple[tuple[Tensor, Tensor], ...]
    heads: tuple[Tensor, ...]
    sha256: tuple[str, str]
    device: torch.device

    @torch.no_grad()
    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """(N,) fp64 of (N, H, W, C) bytes.

        Raises:
            DyditError: If the images are too small.
        """
        if min(first.shape[1:3]) < SMALLEST:
            raise DyditError(
                f"LPIPS cannot be measured on images of {first.shape[1]}x{first.shape[2]}.",
                why=f"Its network needs {SMALLEST}x{SMALLEST} pixels at least.",
                fix="Leave out --lpips for such images.",
            )
        rows = zip(first.split(32), second.split(32), strict=True)
        return torch.cat([self._distances(*pair) for pair in rows])

    def _distances(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros(len(first), dtype=torch.float64)
        for head, left, right in zip(self.heads, self._maps(first), self._maps(second), strict=True):
            apart = F.conv2d((left - right).square(), head)
            total += apart.mean(dim=(1, 2, 3)).cpu().double()
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The five maps, each position of unit length."""
        planes = images.to(self.device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 127.5 - 1
        shift, scale = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (SHIFT, SCALE)
        )
        hidden, maps = (planes - shift) / scale, []
        for (weight, bias), (_, _, _, _, stride, padding, pooled) in zip(
            self.trunk, CONVOLUTIONS, strict=True
        ):
            if pooled:
                hidden = F.max_pool2d(hidden, 3, stride=2)
            hidden = F.relu(F.conv2d(hidden, weight, bias, stride, padding))
            maps.append(hidden / (hidden.square().sum(dim=1, keepdim=True).sqrt() + EPS))
        return maps


def open_lpips(folder: Path, device: torch.device) -> Lpips:
    """Read both files of a folder, told apart by what they hold.

    Raises:
        DyditError: If one is missing, or holds something else.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in (".pth", ".pt", ".safetensors"))
    heads = trunk = None
    for path in files:
        tensors = read_checkpoint(path).tensors
        if "lin0.model.1.weight" in tensors:
            heads = (path, tensors)
        elif "features.0.weight" in tensors:
            trunk = (path, tensors)
    if heads is None or trunk is None:
        missing = "the linear heads" if heads is None else "AlexNet"
        raise DyditError(
            f"{folder} does not hold LPIPS.",
            why=f"No file of it holds {missing}." if folder.is_dir() else "No such folder exists.",
            fix=BRING,
        )
    convolutions = tuple(
        (
            _tensor(trunk, f"{key}.weight", (after, before, kernel, kernel)),
            _tensor(trunk, f"{key}.bias", (after,)),
        )
        for key, after, before, kernel, *_ in CONVOLUTIONS
    )
    linear = tuple(
        _tensor(heads, f"lin{index}.model.1.weight", (1, after, 1, 1))
        for index, (_, after, *_) in enumerate(CONVOLUTIONS)
    )
    return Lpips(
        tuple((weight.to(device), bias.to(device)) for weight, bias in convolutions),
        tuple(head.to(device) for head in linear),
        (file_hash(heads[0]), file_hash(trunk[0])),
        device,
    )


def _tensor(source: tuple[Path, Mapping[str, Tensor]], key: str, shape: tuple[int, ...]) -> Tensor:
    path, tensors = source
    found = tensors.get(key)
    if found is None or tuple(found.shape) != shape:
        held = "none of that name" if found is None else f"one of shape {tuple(found.shape)}"
        raise DyditError(
            f"{path} is not a part of LPIPS with AlexNet.",
            why=f"It needs a tensor {key} of shape {shape} and has {held}.",
            fix=BRING,
        )
    return found.float()
