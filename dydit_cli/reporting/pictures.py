"""Pictures and masks as text that a page of HTML holds: PNG files as data URIs, bits in base64."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

LATENT_PERCENTILES = (1.0, 99.0)
LONGEST_SIDE = 384
"""Pixels; larger pictures are made smaller, or a page of FLUX's would weigh tens of megabytes."""


def png(pixels: NDArray) -> str:
    """(H, W), (H, W, 1) or (H, W, 3) bytes as the data URI of a PNG file."""
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    longest = max(image.size)
    if longest > LONGEST_SIDE:
        scale = LONGEST_SIDE / longest
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
    if is_grey(image):
        image = image.convert("L")
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def is_grey(image: Image.Image) -> bool:
    """Whether the three channels of a picture are the same."""
    if image.mode != "RGB":
        return False
    values = np.asarray(image)
    return bool((values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all())


def limits_of(samples: Tensor) -> tuple[float, float]:
    """The values that are drawn as black and white: -1 and 1 of pixels; latents reach further and have percentiles."""
    if float(samples.abs().max()) <= 1:
        return -1.0, 1.0
    low, high = np.percentile(samples.float().cpu().numpy(), LATENT_PERCENTILES)
    return float(low), float(max(high, low + 1e-6))


def picture(sample: Tensor, limits: tuple[float, float]) -> NDArray:
    """(C, h, w) -> bytes (h, w) or (h, w, 3); of latents the first three channels, which look enough like the image."""
    low, high = limits
    scaled = ((sample.float().cpu() - low) / (high - low)).clamp(0, 1)
    shown = scaled[0] if len(scaled) < 3 else scaled[:3].permute(1, 2, 0)
    bytes_of: NDArray = (shown * 255).round().to(torch.uint8).numpy()
    return bytes_of


def bits(mask: Tensor) -> str:
    """A mask of any shape as base64: eight entries a byte, in row-major order, the first in the highest bit."""
    return base64.b64encode(np.packbits(mask.cpu().numpy().astype(bool).reshape(-1)).tobytes()).decode(
        "ascii"
    )


def shares(values: Tensor) -> str:
    """Numbers in [0, 1] of any shape as base64: a byte each, 255 for 1."""
    scaled = (values.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return base64.b64encode(scaled.cpu().numpy().tobytes()).decode("ascii")
