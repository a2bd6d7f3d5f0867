"""Linear layers whose weights follow the timestep: beside the weight stands a sum of experts of low rank (TD-LoRA).

    W(t) = W + (sum_i a_i(t) B_i) A,    a(t) = softmax(gate(E_t))

E_t is what the width routers read. It reaches a layer as an argument: taken from a context it would be wrong when gradient
checkpointing replays a block. Executors see such layers as a `TimedLayer` and ask for their factors; nothing here knows who
trained them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TimedFactor:
    """One sum of experts.

    Attributes:
        first: A, (r, in).
        experts: B_i, (N, out, r), scaled.
        gate_weight: (N, C).
        gate_bias: (N,).
    """

    first: Tensor
    experts: Tensor
    gate_weight: Tensor
    gate_bias: Tensor

    def mixture(self, time_embedding: Tensor) -> Tensor:
        """(B, C) timestep embeddings -> (B, N) weights of the experts, in fp32."""
        logits = F.linear(time_embedding.float(), self.gate_weight.float(), self.gate_bias.float())
        return logits.softmax(dim=-1)

    def mixed(self, time_embedding: Tensor) -> Tensor:
        """sum_i a_i(t) B_i of each sample, (B, out, r)."""
        weights = self.mixture(time_embedding).to(self.experts.dtype)
        return torch.einsum("bn,nor->bor", weights, self.experts)


class TimedLayer:
    """What a linear layer is, beside a module, if its weight follows the timestep. Called with inputs and timestep embedding."""

    def timed_factors(self) -> Sequence[TimedFactor]:
        """What is added to its weight; nothing while it is switched off."""
        raise NotImplementedError


class TimedLinear(nn.Linear, TimedLayer):
    """A linear layer with experts of its own; weight and bias keep the names that they have without.

    Args:
        in_features: Of a linear layer.
        out_features: Of a linear layer.
        bias: Whether it has one.
        rank: r.
        experts: N.
        time_channels: C, channels of the timestep embedding.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, rank: int, experts: int, time_channels: int
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.timed_first = nn.Parameter(torch.zeros(rank, in_features))
        self.timed_experts = nn.Parameter(torch.zeros(experts, out_features, rank))
        self.timed_gate = nn.Linear(time_channels, experts)

    def timed_factors(self) -> Sequence[TimedFactor]:
        """See `TimedLayer`."""
        gate = self.timed_gate
        return (TimedFactor(self.timed_first, self.timed_experts, gate.weight, gate.bias),)

    def forward(self, inputs: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """(B, T, in) inputs and the (B, C) timestep embedding of their samples -> (B, T, out).

        Raises:
            TypeError: Without the embedding.
        """
        result = super().forward(inputs)
        for factor in self.timed_factors():
            reduced = F.linear(inputs, factor.first)
            experts = factor.mixed(needed(time_embedding))
            result = result + (reduced @ experts.transpose(1, 2)).to(result.dtype)
        return result


def needed(time_embedding: Tensor | None) -> Tensor:
    """The embedding.

    Raises:
        TypeError: If there is none.
    """
    if time_embedding is None:
        raise TypeError("a layer whose weight follows the timestep needs the timestep embedding")
    return time_embedding


def through(layer: nn.Module, inputs: Tensor, time_embedding: Tensor | None) -> Tensor:
    """A linear layer's output; one whose weight follows the timestep is told it, by the (B, C) embedding."""
    result: Tensor = layer(inputs, time_embedding) if isinstance(layer, TimedLayer) else layer(inputs)
    return result


def is_timed(module: nn.Module) -> bool:
    """Whether a module holds a layer whose weight follows the timestep now."""
    return any(isinstance(layer, TimedLayer) and layer.timed_factors() for layer in module.modules())
