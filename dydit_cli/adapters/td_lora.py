"""TD-LoRA on peft: a low-rank update whose left factor is a mixture of experts chosen by the timestep.

    dW(t) = s * (sum_i a_i(t) B_i) A,    a(t) = softmax(gate(E_t)),    s = alpha / r

A is shared and starts as LoRA's does; the N experts B_i start at zero, so that training starts from the base model. E_t is the
timestep embedding that the width routers read, and reaches a layer as an argument (`dydit_cli/dynamic/timed.py`, which is all that
executors know of it).

The published description (DyDiT++, arXiv 2504.06803) says that one low-rank matrix is extended to several experts mixed by weights
computed from the timestep embedding. Which matrix, how the weights are normalised and how many experts there are is ours.

peft refuses unknown adapter types. What it offers is a LoRA layer of one's own, marked experimental; one contract test covers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from dydit_cli.dynamic.timed import TimedFactor, TimedLayer, needed
from dydit_cli.errors import DyditError

GATE = "lora_gate"


@dataclass
class TDLoraConfig(LoraConfig):
    """peft's configuration of LoRA with what TD-LoRA adds.

    Attributes:
        num_experts: N.
        gate_features: Channels of the timestep embedding.
    """

    num_experts: int = field(default=4, metadata={"help": "Experts that are mixed by the timestep."})
    gate_features: int = field(default=0, metadata={"help": "Channels of the timestep embedding."})

    def __post_init__(self) -> None:
        """Have peft put `TDLoraLinear` in the place of linear layers."""
        super().__post_init__()
        self._register_custom_module({nn.Linear: TDLoraLinear})


class TDLoraVariant(LoraVariant):
    """What peft asks of a kind of LoRA; the arithmetic is the layer's."""

    def supports_lora_conversion(self) -> bool:
        """One LoRA cannot stand for all timesteps."""
        return False

    @staticmethod
    def init(module: TDLoraLinear, adapter_name: str, config: TDLoraConfig, **options: Any) -> None:
        """Widen B to N experts, at zero, and add the gate."""
        first = module.lora_A[adapter_name].weight
        experts = nn.Linear(config.r, config.num_experts * module.out_features, bias=False)
        nn.init.zeros_(experts.weight)
        module.lora_B[adapter_name] = experts.to(first)
        if not hasattr(module, GATE):
            setattr(module, GATE, nn.ModuleDict())
        gates = cast(nn.ModuleDict, getattr(module, GATE))
        gates[adapter_name] = nn.Linear(config.gate_features, config.num_experts).to(first)

    @staticmethod
    def merge_safe(module: TDLoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Not to be had.

        Raises:
            DyditError: Always.
        """
        raise no_single_merge()

    @staticmethod
    def merge_unsafe(module: TDLoraLinear, active_adapter: str, orig_weight: Tensor) -> None:
        """Not to be had.

        Raises:
            DyditError: Always.
        """
        raise no_single_merge()

    @staticmethod
    def unmerge(module: TDLoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Not to be had.

        Raises:
            DyditError: Always.
        """
        raise no_single_merge()


def no_single_merge() -> DyditError:
    """The error for whoever would merge a TD-LoRA once and for all."""
    return DyditError(
        "A TD-LoRA cannot be merged into the weights once and for all.",
        why="Its update is another one at each timestep.",
        fix="Leave it attached: compact execution merges it into the active weights at each step.",
    )


class TDLoraLinear(LoraLinear, TimedLayer):
    """A linear layer with TD-LoRA adapters. Its forward takes the timestep embedding beside its input."""

    adapter_layer_names = (*LoraLinear.adapter_layer_names, GATE)
    lora_gate: nn.ModuleDict

    def resolve_lora_variant(self, *, config: LoraConfig, **options: Any) -> LoraVariant:
        """peft asks which kind of LoRA an adapter is."""
        return TDLoraVariant()

    def factor(self, adapter: str) -> TimedFactor:
        """What an adapter adds."""
        gate, scale, experts = (
            cast(nn.Linear, self.lora_gate[adapter]),
            self.scaling[adapter],
            self.experts(adapter),
        )
        scaled = experts if scale == 1 else scale * experts
        return TimedFactor(cast(Tensor, self.lora_A[adapter].weight), scaled, gate.weight, gate.bias)

    def timed_factors(self) -> Sequence[TimedFactor]:
        """See `TimedLayer`."""
        return [self.factor(name) for name in self.active_here()]

    def experts(self, adapter: str) -> Tensor:
        """(N, out, r)."""
        return cast(Tensor, self.lora_B[adapter].weight).view(-1, self.out_features, self.r[adapter])

    def active_here(self) -> list[str]:
        """The adapters that count now."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, inputs: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """(B, T, in) inputs and the (B, C) timestep embedding of their samples -> (B, T, out).

        Raises:
            TypeError: Without the embedding, if an adapter is active.
        """
        result: Tensor = self.base_layer(inputs)
        for name in self.active_here():
            first = self.lora_A[name]
            reduced = first(self.lora_dropout[name](inputs.to(cast(Tensor, first.weight).dtype)))
            mixed = self.factor(name).mixed(needed(time_embedding))
            result = result + (reduced @ mixed.transpose(1, 2)).to(result.dtype)
        return result
