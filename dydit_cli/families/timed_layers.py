"""Models whose weights follow the timestep (TD-LoRA): which layers can, and how a model is made with them.

Such a model has an entry ``td_lora`` in its configuration. Its files hold the experts beside the weights, so that loading needs
no other library and a moved folder works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from dydit_cli.dynamic.timed import TimedLinear
from dydit_cli.errors import DyditError


class ModelOfBlocks(Protocol):
    """What is asked of a model here."""

    @property
    def dynamic_blocks(self) -> list[Any]:
        """The blocks in their order."""
        ...

    def named_modules(self) -> Any:
        """As a module has it."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """As a module has it."""
        ...


def adaptable_layers(model: ModelOfBlocks) -> list[str]:
    """Names of the linear layers whose width is dynamic: q, k, v, output projections and MLPs."""
    chosen = {
        id(linear)
        for block in model.dynamic_blocks
        for layer, _ in block.sliced_layers()
        for linear in layer.modules()
        if isinstance(linear, nn.Linear)
    }
    return [name for name, module in model.named_modules() if id(module) in chosen]


def insert_timed_layers(model: ModelOfBlocks, settings: Mapping[str, Any], time_channels: int) -> None:
    """Put layers with experts in the place of a new model's linear layers, before weights are loaded.

    Args:
        model: Without any.
        settings: ``rank`` and ``experts``.
        time_channels: Channels of the timestep embedding.

    Raises:
        DyditError: If the settings are not these two numbers.
    """
    try:
        rank, experts = int(settings["rank"]), int(settings["experts"])
    except (KeyError, TypeError, ValueError) as error:
        raise DyditError(
            "The model's td_lora settings cannot be read.",
            why=f"They need the numbers rank and experts: {type(error).__name__} {error}.",
            fix="Load the folder as `dydit finetune` wrote it.",
        ) from error
    for name in adaptable_layers(model):
        old = model.get_submodule(name)
        if isinstance(old, nn.Linear):
            new = TimedLinear(
                old.in_features, old.out_features, old.bias is not None, rank, experts, time_channels
            )
            put(model, name, new)


def put(model: ModelOfBlocks, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with that name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
