"""Frozen weights below adapters in fewer bits: bf16, or int8 and nf4 as bitsandbytes has them.

* *int8*: each row has a scale, its largest magnitude over 127.
* *nf4*: blocks of 64 weights have a scale, their largest magnitude; each weight is one of 16 values that are quantiles of a normal law
  (QLoRA, Dettmers et al., arXiv 2305.14314).

A weight is restored when its layer runs, forwards and backwards, and not kept between: autograd would keep it otherwise, which is all
that was saved. Nothing runs faster for it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.adapters.attaching import adapted_layers
from dydit_cli.errors import DyditError
from dydit_cli.execution.effective import RestoredLayer
from dydit_cli.families.dynamic_model import DynamicModel

BaseKind = Literal["fp32", "bf16", "int8", "nf4"]
NF4 = "nf4"
NF4_BLOCK = 64


def compress_base(model: DynamicModel, kind: BaseKind) -> None:
    """Store the weights below the adapters of ``model`` in fewer bits, in place; fp32 leaves them as they are.

    Raises:
        DyditError: For int8 or nf4 without bitsandbytes.
    """
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
    """(out, in) in fewer bits, and scales.

    Raises:
        DyditError: For int8 or nf4 without bitsandbytes.
    """
    if kind == "bf16":
        return weight.to(torch.bfloat16), torch.ones(1, device=weight.device)
    functional = _bitsandbytes(kind)
    if kind == "int8":
        stored, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return stored, scales
    stored, state = functional.quantize_4bit(weight.float(), blocksize=NF4_BLOCK, quant_type=NF4)
    return stored, state.absmax


def restored(stored: Tensor, scales: Tensor, kind: BaseKind, shape: tuple[int, int]) -> Tensor:
    """The way back of `compressed`, in fp32."""
    if kind == "bf16":
        return stored.float()
    functional = _bitsandbytes(kind)
    if kind == "int8":
        weight: Tensor = functional.int8_vectorwise_dequant(stored, scales)
        return weight.float()
    state = functional.QuantState(
        absmax=scales,
        shape=torch.Size(shape),
        code=functional.get_4bit_type(NF4, device=stored.device),
        blocksize=NF4_BLOCK,
        quant_type=NF4,
        dtype=torch.float32,
    )
    weight = functional.dequantize_4bit(stored, state)
    return weight


def _bitsandbytes(kind: BaseKind) -> ModuleType:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise DyditError(
            f"Frozen weights cannot be stored as {kind}.",
            why="That is done by the package bitsandbytes, which Python does not find.",
            fix="Run `pip install bitsandbytes`, or set base to bf16, which needs nothing.",
        ) from error
    made: ModuleType = functional
    return made
