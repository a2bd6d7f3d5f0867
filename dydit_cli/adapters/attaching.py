"""Attach LoRA or TD-LoRA to a dynamic model: which layers, what trains, what it amounts to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dydit_cli.adapters.td_lora import TDLoraConfig, TDLoraLinear
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.timed_layers import adaptable_layers
from dydit_cli.randomness import generator

AdapterKind = Literal["lora", "td-lora"]
ADAPTER = "default"
"""peft names adapters; a run trains one."""


@dataclass(frozen=True)
class AdapterSettings:
    """What is attached.

    Attributes:
        kind: ``lora`` or ``td-lora``.
        rank: r.
        alpha: The update is multiplied by alpha / r; None means r.
        experts: N, for TD-LoRA.
        dropout: On the input of A, while training.
    """

    kind: AdapterKind
    rank: int = 4
    alpha: float | None = None
    experts: int = 4
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return (self.alpha if self.alpha is not None else self.rank) / self.rank


def attach(model: DynamicModel, settings: AdapterSettings, seed: int = 0) -> DynamicModel:
    """Attach adapters in place; they and the routers are what trains from then on.

    Args:
        model: Without adapters, in dense execution.
        settings: What to attach.
        seed: Of A's starting values.

    Raises:
        DyditError: If adapters are attached already.
    """
    if any(True for _ in adapted_layers(model)):
        raise DyditError(
            "The model has adapters already.",
            why="A second set would be trained on top of the first, and saved without it.",
            fix="Merge the first one, or start from the model that it was attached to.",
        )
    if model.config.get("td_lora") is not None:
        raise DyditError(
            "The model was trained with TD-LoRA, and takes no further adapters.",
            why="Its weights follow the timestep already; an adapter would be one to weights that are not there at any timestep.",
            fix="Start from the model that it was trained from, resume that run with more steps, or use method full.",
        )
    config = peft_config(settings, adaptable_layers(model), time_channels(model))
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            first = layer.lora_A[ADAPTER].weight
            # Kaiming's uniform law as in LoRA, from a generator of our own: a = sqrt(5) gives bounds of 1 / sqrt(in).
            bound = first.shape[1] ** -0.5
            drawn = torch.rand(first.shape, generator=generator(seed, "lora", name))
            first.copy_(bound * (2 * drawn - 1))
            if isinstance(layer, TDLoraLinear):
                gate: Any = layer.lora_gate[ADAPTER]
                bound = gate.weight.shape[1] ** -0.5
                drawn = torch.rand(gate.weight.shape, generator=generator(seed, "lora_gate", name))
                gate.weight.copy_(bound * (2 * drawn - 1))
                gate.bias.zero_()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    return model


def trains(name: str) -> bool:
    """Whether a parameter of a model with adapters trains, by its name: adapters, gates and routers do."""
    return ".lora_" in name or "_router." in name


def peft_config(settings: AdapterSettings, layers: list[str], gate_features: int) -> LoraConfig:
    """The settings in peft's words."""
    common: dict[str, Any] = {
        "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank,
        "lora_dropout": settings.dropout,
        "target_modules": layers,
        "bias": "none",
    }
    if settings.kind == "td-lora":
        return TDLoraConfig(**common, num_experts=settings.experts, gate_features=gate_features)
    return LoraConfig(**common)


def time_channels(model: DynamicModel) -> int:
    """Channels of the timestep embedding."""
    return int(model.geometry.hidden_size)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The layers with adapters, by the name that the layer has in the model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def adapter_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of the adapters, gates included, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def trainable_share(model: DynamicModel) -> float:
    """Parameters that train (adapters and routers), as a share of the static model's."""
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    added = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    return trains / (sum(parameter.numel() for parameter in model.parameters()) - added - routers)
