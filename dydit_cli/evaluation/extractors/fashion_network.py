"""A small classifier of Fashion-MNIST whose features stand in for Inception's, where Inception has nothing to say.

Ours: seven 3x3 convolutions on 32x32 grey images. `scripts/train_feature_net.py` trains it with batch normalisation, which it
folds into the convolutions before it saves; so the network here has none, and an image's features depend on that image alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 32
NUM_CLASSES = 10
# Output channels and stride of each convolution.
LAYERS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (96, 2), (96, 1))
SPATIAL_LAYER = 4
SPATIAL_CHANNELS = 4
FEATURE_SIZE = LAYERS[-1][0]
SPATIAL_SIZE = SPATIAL_CHANNELS * 8 * 8


class FashionNetwork(nn.Module):
    """Grey images (B, 1, 32, 32) in [-1, 1] -> pooled features (B, 96), spatial features (B, 8 · 8 · 4) and logits (B, 10).

    Spatial features are the first four channels of the 8x8 map, position by position (as ADM lays out Inception's).
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [1, *(width for width, _ in LAYERS)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, padding=1)
            for before, (after, stride) in zip(widths, LAYERS, strict=False)
        )
        self.classifier = nn.Linear(FEATURE_SIZE, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        hidden, spatial = images, images
        for index, convolution in enumerate(self.convolutions):
            hidden = F.relu(convolution(hidden))
            if index == SPATIAL_LAYER:
                spatial = hidden[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pooled = hidden.mean(dim=(2, 3))
        logits: Tensor = self.classifier(pooled)
        return pooled, spatial, logits


def padded(images: Tensor) -> Tensor:
    """(B, 28 or 32, 28 or 32) bytes -> (B, 1, 32, 32) in [-1, 1], black around the smaller as `dydit_cli.data` pads them."""
    border = (IMAGE_SIZE - images.shape[-1]) // 2
    scaled = images[:, None].float().div(127.5).sub(1.0)
    return F.pad(scaled, [border] * 4, value=-1.0) if border else scaled


def predictions(logits: Tensor) -> Tensor:
    """(B, 10) logits -> (B,) the class that is nearest."""
    return torch.argmax(logits, dim=1)
