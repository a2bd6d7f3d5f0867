"""PSNR and SSIM of 8-bit images, in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.errors import DyditError

PEAK = 255.0
IDENTICAL_DB = 100.0
"""PSNR of identical images, which have none; also the most that any pair is given."""

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """(N,) peak signal-to-noise ratios in dB of (N, H, W, C) bytes; higher is nearer, identical images have 100."""
    squares = (first.double() - second.double()).square().flatten(1).mean(dim=1)
    ratio = 10 * (PEAK**2 / squares.clamp(min=1e-12)).log10()
    return ratio.clamp(max=IDENTICAL_DB)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """(N,) mean structural similarities of (N, H, W, C) bytes, 1 for identical images.

    Wang et al. 2004: a Gaussian window of 11x11 with σ = 1.5, where it lies inside the image; each channel by itself, then the
    mean. Their program shrinks large pictures first; here none is shrunk.

    Raises:
        DyditError: If the images are smaller than the window.
    """
    height, width = first.shape[1:3]
    if min(height, width) < WINDOW:
        raise DyditError(
            f"SSIM cannot be measured on images of {height}x{width}.",
            why=f"Its window has {WINDOW}x{WINDOW} pixels.",
            fix="Compare larger images.",
        )
    return torch.cat([_ssim(*rows) for rows in zip(first.split(64), second.split(64), strict=True)])


def _ssim(first: Tensor, second: Tensor) -> Tensor:
    x, y = (images.double().permute(0, 3, 1, 2) for images in (first, second))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x * mean_x
    variance_y = _blurred(y * y) - mean_y * mean_y
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    scale = (mean_x * mean_x + mean_y * mean_y + c1) * (variance_x + variance_y + c2)
    return (likeness / scale).flatten(1).mean(dim=1)


def _blurred(planes: Tensor) -> Tensor:
    """Gaussian means over the window, where it lies inside."""
    offsets = torch.arange(WINDOW, dtype=planes.dtype, device=planes.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    batch = planes.flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(batch, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return blurred[:, 0].unflatten(0, planes.shape[:2])
