"""The Inception-v3 that Fréchet distances are defined on: TensorFlow's network of 2015-12-05, in the layout of its PyTorch ports.

Source of the layout: https://github.com/mseitzer/pytorch-fid and https://github.com/toshas/torch-fidelity, whose files share
their keys. It differs from the ImageNet classifier of the same name: 1,008 classes, average pools that leave the border out of
the mean, a maximum pool where the last block should average, batch normalisation with eps 0.001, no auxiliary head.
The network is written as tables, one row a branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 299
FEATURE_SIZE = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_SIZE = SPATIAL_CHANNELS * 17 * 17
SPATIAL_BLOCK = "Mixed_6d"
"""ADM's sFID reads ``mixed_6/conv:0`` of the graph: the 1x1 branch of this block, after its ReLU."""


@dataclass(frozen=True)
class Conv:
    """One convolution of a table: key, output channels, kernel; stride 1 keeps the size, stride 2 pads nothing."""

    key: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


@dataclass(frozen=True)
class Branch:
    """A chain of convolutions, after a pool or none; the last ones of ``fork`` run side by side on the chain's end."""

    chain: tuple[Conv, ...]
    pool: str | None = None
    fork: tuple[Conv, ...] = ()


def _block_a(pool_channels: int) -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch1x1", 64),)),
        Branch((Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5)))),
        Branch(
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3)),
            )
        ),
        Branch((Conv("branch_pool", pool_channels),), pool="average"),
    )


def _block_b() -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch3x3", 384, (3, 3), 2),)),
        Branch(
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3), 2),
            )
        ),
        Branch((), pool="reduce"),
    )


def _block_c(inner: int) -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch1x1", 192),)),
        Branch(
            (
                Conv("branch7x7_1", inner),
                Conv("branch7x7_2", inner, (1, 7)),
                Conv("branch7x7_3", 192, (7, 1)),
            )
        ),
        Branch(
            (
                Conv("branch7x7dbl_1", inner),
                Conv("branch7x7dbl_2", inner, (7, 1)),
                Conv("branch7x7dbl_3", inner, (1, 7)),
                Conv("branch7x7dbl_4", inner, (7, 1)),
                Conv("branch7x7dbl_5", 192, (1, 7)),
            )
        ),
        Branch((Conv("branch_pool", 192),), pool="average"),
    )


def _block_d() -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2))),
        Branch(
            (
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, (1, 7)),
                Conv("branch7x7x3_3", 192, (7, 1)),
                Conv("branch7x7x3_4", 192, (3, 3), 2),
            )
        ),
        Branch((), pool="reduce"),
    )


def _block_e(pool: str) -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch1x1", 320),)),
        Branch(
            (Conv("branch3x3_1", 384),),
            fork=(Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))),
        ),
        Branch(
            (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3))),
            fork=(Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        Branch((Conv("branch_pool", 192),), pool=pool),
    )


BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


class NormalisedConv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, images: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H', W')."""
        return F.relu(self.bn(self.conv(images)))


class Mixed(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, before: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            channels = before
            for conv in branch.chain:
                self._add(channels, conv)
                channels = conv.channels
            for conv in branch.fork:
                self._add(channels, conv)
            self.channels += sum(conv.channels for conv in branch.fork) or channels

    def _add(self, before: int, conv: Conv) -> None:
        height, width = conv.kernel
        padding = (height // 2, width // 2) if conv.stride == 1 else (0, 0)
        self.add_module(conv.key, NormalisedConv(before, conv.channels, conv.kernel, conv.stride, padding))

    def forward(self, images: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, channels, H', W')."""
        parts = []
        for branch in self.branches:
            hidden = _pooled(images, branch.pool)
            for conv in branch.chain:
                hidden = self.get_submodule(conv.key)(hidden)
            parts += [self.get_submodule(conv.key)(hidden) for conv in branch.fork] or [hidden]
        return torch.cat(parts, dim=1)


def _pooled(images: Tensor, kind: str | None) -> Tensor:
    if kind == "average":
        # TensorFlow divides by the pixels that are there.
        return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "maximum":
        return F.max_pool2d(images, 3, stride=1, padding=1)
    if kind == "reduce":
        return F.max_pool2d(images, 3, stride=2)
    return images


class InceptionNetwork(nn.Module):
    """Images (B, 3, 299, 299) in about [-1, 1] -> pooled (B, 2048), spatial (B, 17 · 17 · 7), logits without bias (B, 1008).

    The spatial part is laid out position by position, and the inception score leaves the bias out, both as ADM's evaluation does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = NormalisedConv(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = NormalisedConv(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = NormalisedConv(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = NormalisedConv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = NormalisedConv(80, 192, (3, 3))
        channels = 192
        for name, branches in BLOCKS.items():
            block = Mixed(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(FEATURE_SIZE, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        hidden = _pooled(hidden, "reduce")
        hidden = _pooled(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden)), "reduce")
        spatial = hidden
        for name in BLOCKS:
            block = self.get_submodule(name)
            if name == SPATIAL_BLOCK:
                narrow = block.get_submodule("branch1x1")(hidden)[:, :SPATIAL_CHANNELS]
                spatial = narrow.permute(0, 2, 3, 1).flatten(1)
            hidden = block(hidden)
        pooled = hidden.mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T
