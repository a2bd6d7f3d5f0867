"""Frozen weights below adapters in fewer bits: bf16, int8 or nf4, in plain torch.

* *int8*: each row has a scale, its largest magnitude over 127.
* *nf4*: blocks of 64 weights have a scale, their largest magnitude; each weight is the nearest of 16 values that are quantiles of a
  normal law (QLoRA, Dettmers et al., arXiv 2305.14314, appendix E, which prints the values).

A weight is restored when its layer runs, forwards and backwards, and not kept between: autograd would keep it otherwise, which is all
that was saved. Nothing runs faster for it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.adapters.attaching import adapted_layers
from dydit_cli.execution.effective import RestoredLayer
from dydit_cli.families.dynamic_model import DynamicModel

BaseKind = Literal["fp32", "bf16", "int8", "nf4"]
INT8_LARGEST = 127
NF4_BLOCK = 64
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def compress_base(model: DynamicModel, kind: BaseKind) -> None:
    """Store the weights below the adapters of ``model`` in fewer bits, in place; fp32 leaves them as they are."""
    if kind == "fp32":
        return
    for _, layer in adapted_layers(model):
        layer.base_layer = StoredLinear(layer.base_layer, kind)


class StoredLinear(nn.Module, RestoredLayer):
    """A frozen linear layer whose weight is stored in fewer bits.

    Args:
        layer: What it replaces.
        kind: How it is stored.
    """

    stored: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, kind: BaseKind) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.bias = layer.bias
        stored, scales = compressed(layer.weight.detach(), kind)
        self.register_buffer("stored", stored)
        self.register_buffer("scales", scales)

    def restored_weight(self) -> Tensor:
        """(out, in), in fp32."""
        return restored(self.stored, self.scales, self.kind, (self.out_features, self.in_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        result: Tensor = _ThroughRestored.apply(inputs, self)
        return result


class _ThroughRestored(torch.autograd.Function):
    """A product with a weight that is restored once more for the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        bias: Tensor | None = layer.bias
        weight = layer.restored_weight().to(inputs.dtype)
        return F.linear(inputs, weight, None if bias is None else bias.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.restored_weight().to(gradient.dtype), None


def compressed(weight: Tensor, kind: BaseKind) -> tuple[Tensor, Tensor]:
    """(out, in) in fewer bits, and scales."""
    exact = weight.float()
    if kind == "bf16":
        return weight.to(torch.bfloat16), exact.new_ones(1)
    if kind == "int8":
        scales = _not_zero(exact.abs().amax(dim=1, keepdim=True)) / INT8_LARGEST
        return (exact / scales).round().to(torch.int8), scales
    flat = F.pad(exact.flatten(), (0, -exact.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = _not_zero(flat.abs().amax(dim=1, keepdim=True))
    values = torch.tensor(NF4_VALUES, device=weight.device)
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(flat / scales, between).to(torch.uint8).view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], scales


def restored(stored: Tensor, scales: Tensor, kind: BaseKind, shape: tuple[int, int]) -> Tensor:
    """The way back of `compressed`, in fp32."""
    if kind == "bf16":
        return stored.float()
    if kind == "int8":
        return stored.float() * scales
    codes = torch.stack([stored // 16, stored % 16], dim=1).view(-1, NF4_BLOCK).long()
    flat = torch.tensor(NF4_VALUES, device=stored.device)[codes] * scales
    return flat.flatten()[: shape[0] * shape[1]].view(shape)


def _not_zero(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))
