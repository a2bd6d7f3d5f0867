"""What the blocks ask of the program that they run in: a layer's weights as they are to be used, and attention.

In ComfyUI a stored weight may lie on another device, in another type, quantised, or wait for LoRAs; `comfy.ops.cast_bias_weight`
makes of it what a forward needs. Outside ComfyUI (where dydit verifies an export) weights are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from .problems import NodeError


class Host(Protocol):
    """See above."""

    def weights(self, layer: Any, inputs: Tensor) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """A linear layer's weight and bias on the device and in the type of ``inputs``, valid inside the block."""
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """(B, h, Q, D), twice (B, h, S, D) -> (B, Q, h * D); ``options`` are ComfyUI's ``transformer_options``."""
        ...

    def refuse_layer(self, layer: Any) -> None:
        """Raise a `NodeError` if `weights` cannot make sense of a layer."""
        ...


class TorchHost:
    """Plain modules, plain attention."""

    @contextmanager
    def weights(self, layer: Any, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Host`."""
        yield layer.weight, layer.bias

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """See `Host`."""
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2)

    def refuse_layer(self, layer: Any) -> None:
        """See `Host`."""


class ComfyHost:
    """ComfyUI's own casts and the attention that its user has chosen.

    Args:
        ops: The module ``comfy.ops``.
        attention: ``optimized_attention`` of ``comfy.ldm.modules.attention``.
    """

    def __init__(self, ops: Any, attention: Any) -> None:
        self._ops = ops
        self._attention = attention
        self._quantised = getattr(ops, "QuantizedTensor", ())

    @contextmanager
    def weights(self, layer: Any, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Host`. ComfyUI is told when they are no longer needed, so that it can offload while others are computed."""
        weight, bias, handle = self._ops.cast_bias_weight(layer, inputs, offloadable=True)
        try:
            yield (weight.dequantize() if isinstance(weight, self._quantised) else weight), bias
        finally:
            self._ops.uncast_bias_weight(layer, weight, bias, handle)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """See `Host`."""
        mixed: Tensor = self._attention(
            query, key, value, query.shape[1], mask=mask, skip_reshape=True, transformer_options=options
        )
        return mixed

    def refuse_layer(self, layer: Any) -> None:
        """See `Host`. Layers that unpack or scale weights in a way of their own would be read wrongly."""
        own_cast = hasattr(layer, "cast_bias_weight") or getattr(layer, "scale_weight", None) is not None
        if isinstance(layer, self._ops.CastWeightBiasOp) and not own_cast:
            return
        raise NodeError(
            f"The model's layers ({type(layer).__module__}.{type(layer).__name__}) are not ComfyUI's own.",
            why="Their weights are stored in a form (GGUF, Nunchaku, scaled fp8) that only they can read, and slices of them are needed.",
            fix="Load the .safetensors file with 'Load Diffusion Model'.",
        )


def comfy_host() -> ComfyHost:
    """The running ComfyUI.

    Raises:
        NodeError: If it is too old.
    """
    import comfy.ops  # type: ignore[import-not-found]  # ComfyUI's own
    from comfy.ldm.modules.attention import optimized_attention  # type: ignore[import-not-found]

    if not hasattr(comfy.ops, "uncast_bias_weight"):
        raise NodeError(
            "This ComfyUI is too old for the node.",
            why="It has no comfy.ops.uncast_bias_weight, by which weights are handed back.",
            fix="Update ComfyUI.",
        )
    return ComfyHost(comfy.ops, optimized_attention)
