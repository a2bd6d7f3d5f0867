"""From bytes to Inception's input, as each of the two PyTorch ports does it; features differ visibly between the two.

* `tensorflow`: the graph's own `ResizeBilinear`, as in torch-fidelity, in the original FID program and in ADM's evaluation:
  pixel i of the output reads position i · in / out, without half-pixel centres and without smoothing; then (x − 128) / 128.
* `pytorch-fid`: `F.interpolate(bilinear, align_corners=False)` of x / 255, without smoothing; then 2x − 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.evaluation.extractors.inception_network import IMAGE_SIZE

TENSORFLOW, PYTORCH_FID = "tensorflow", "pytorch-fid"


def prepared(images: Tensor, resize: str) -> Tensor:
    """(B, H, W, 1 or 3) bytes -> (B, 3, 299, 299) fp32, by ``tensorflow`` or ``pytorch-fid``."""
    planes = images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
    if resize == PYTORCH_FID:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return 2 * F.interpolate(planes / 255, size=size, mode="bilinear", align_corners=False) - 1
    return (tensorflow_bilinear(planes, IMAGE_SIZE) - 128) / 128


def tensorflow_bilinear(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size) as TensorFlow 1's `resize_bilinear(align_corners=False)`."""
    rows, rows_after, down = _positions(images.shape[2], size, images)
    columns, columns_after, right = _positions(images.shape[3], size, images)
    wide = torch.lerp(images[..., columns], images[..., columns_after], right)
    return torch.lerp(wide[..., rows, :], wide[..., rows_after, :], down[:, None])


def _positions(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each output pixel reads: the pixel before, the pixel after, and how far between them."""
    # In fp32, as the kernel computes it.
    exact = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
    before = exact.long().clamp(max=length - 1)
    after = (before + 1).clamp(max=length - 1)
    return before.to(like.device), after.to(like.device), (exact - before).to(like)
