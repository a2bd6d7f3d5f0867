"""PSNR and SSIM against computations pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.pairs.similarity import IDENTICAL_DB, psnr, ssim


def pictures(seed: int, channels: int = 3, side: int = 16) -> Tensor:
    return torch.randint(
        256, (2, side, side + 3, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def near(images: Tensor, seed: int) -> Tensor:
    noise = torch.randint(-20, 21, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_of_a_known_error() -> None:
    black = torch.zeros(1, 12, 12, 1, dtype=torch.uint8)
    assert float(psnr(black, black + 255)) == pytest.approx(0)
    assert float(psnr(black, black + 16)) == pytest.approx(20 * np.log10(255 / 16))


def test_identical_images_have_the_largest_values() -> None:
    images = pictures(0)
    assert psnr(images, images).tolist() == [IDENTICAL_DB] * 2
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 2)


def ssim_by_pixel(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, window by window with weighted sums."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    height, width, channels = first.shape
    for channel in range(channels):
        for top in range(height - 10):
            for left in range(width - 10):
                x = first[top : top + 11, left : left + 11, channel].astype(float)
                y = second[top : top + 11, left : left + 11, channel].astype(float)
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_papers(channels: int) -> None:
    first = pictures(1, channels)
    second = near(first, 2)
    expected = [ssim_by_pixel(a.numpy(), b.numpy()) for a, b in zip(first, second, strict=True)]
    assert ssim(first, second).tolist() == pytest.approx(expected, abs=1e-10)
    assert 0.5 < expected[0] < 0.999


def test_ssim_is_scipys_filter() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    first, second = pictures(3, 1, 24), near(pictures(3, 1, 24), 4)
    x, y = first[0, ..., 0].numpy().astype(float), second[0, ..., 0].numpy().astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert float(ssim(first, second)[0]) == pytest.approx(float(expected), abs=1e-10)


def test_images_smaller_than_the_window_are_refused() -> None:
    small = torch.zeros(1, 8, 8, 1, dtype=torch.uint8)
    with pytest.raises(DyditError, match="8x8"):
        ssim(small, small)
