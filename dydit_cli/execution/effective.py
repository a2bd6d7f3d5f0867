"""The weights that a linear layer effectively computes with: its own, and what adapters attached through peft add.

What follows the timestep is not among them; see `dydit_cli/dynamic/timed.py`.

peft is not imported here: layers of its kind exist only where somebody else has.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from dydit_cli.dynamic.timed import TimedLayer
from dydit_cli.errors import DyditError
from dydit_cli.execution.quantised import int8_rows, is_quantised, plain

SCALE_DIGITS = 6
"""diffusers multiplies and divides an adapter's scale around each forward, which leaves rounding behind."""


class RestoredLayer:
    """What a linear layer is, beside a module, if its weight is stored in another form, as frozen weights below adapters are."""

    bias: Tensor | None

    def restored_weight(self) -> Tensor:
        """(out, in)."""
        raise NotImplementedError


def is_adapted(module: nn.Module) -> bool:
    """Whether peft has attached adapters to the module."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def adapter_state(module: nn.Module) -> Hashable:
    """What decides which adapters a module computes with, beside their weights; None for a module without any."""
    if not is_adapted(module):
        return None
    held: Any = module
    scales = getattr(held, "scaling", {})
    return (
        tuple(held.active_adapters),
        bool(held.disable_adapters),
        tuple(held.merged_adapters),
        tuple((name, float(f"{scale:.{SCALE_DIGITS}g}")) for name, scale in scales.items()),
    )


def effective(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) with which a linear layer computes now.

    Raises:
        DyditError: If they are not there, or are more than a weight and a bias.
    """
    if not is_adapted(layer):
        return _of_linear(layer)
    held: Any = layer
    weight, bias = _of_linear(held.base_layer)
    if held.disable_adapters:
        if held.merged:
            raise _cannot_slice(layer, "Its adapter is merged into the weights and disabled at once")
        return weight, bias
    if isinstance(layer, TimedLayer):
        return weight, bias
    if isinstance(held.base_layer, TimedLayer):
        raise _cannot_slice(layer, "Its adapter is attached to a layer whose weight follows the timestep")
    lora = sys.modules.get("peft.tuners.lora.layer")
    for name in held.active_adapters:
        if lora is None or not isinstance(layer, lora.Linear):
            raise _cannot_slice(layer, "Of adapters attached to it, plain LoRA alone can be added to weights")
        if name not in held.lora_A or name in held.merged_adapters:
            continue
        if name in held.lora_variant:
            raise _cannot_slice(layer, "Its adapter is a variant of LoRA that is no sum of weights")
        weight = weight + held.get_delta_weight(name).to(weight.dtype)
        if held.lora_B[name].bias is not None:
            bias = bias + (held.scaling[name] * held.lora_B[name].bias).to(bias.dtype)
    return weight, bias


def as_stored(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, with a weight that is kept in int8 as its int8 values, and the (out,) scales of its rows behind."""
    if isinstance(layer, nn.Linear) and not is_adapted(layer):
        held = int8_rows(layer.weight)
        if held is not None:
            _check_at_hand(layer)
            values, scale = held
            return values, layer.bias if layer.bias is not None else scale.new_zeros(len(values)), scale
    return *effective(layer), None


def _of_linear(layer: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(layer, RestoredLayer):
        weight = layer.restored_weight()
        return weight, layer.bias if layer.bias is not None else weight.new_zeros(len(weight))
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise _cannot_slice(
            layer, "It slices the weights of linear layers, and an adapter or a quantised layer holds more"
        )
    _check_at_hand(layer)
    if is_quantised(layer.weight) and int8_rows(layer.weight) is None:
        raise _cannot_slice(
            layer,
            "Of quantised weights it knows int8 with a scale for each row (Int8WeightOnlyConfig(version=2)), and none else",
        )
    weight, bias = plain(layer.weight), layer.bias
    return weight, bias if bias is not None else weight.new_zeros(layer.out_features)


def _check_at_hand(layer: nn.Linear) -> None:
    """Raise a `DyditError` if the layer's weight comes only when it is called."""
    if layer.weight.is_meta:
        raise _cannot_slice(layer, "Its weights are kept elsewhere until its own forward is called")
    hooks = getattr(layer, "_diffusers_hook", None)
    if hooks is not None:
        for name, told in (
            ("layerwise_casting", "Its weights are stored in another type until its own forward is called"),
            ("group_offloading", "Its weights are kept elsewhere until its own forward is called"),
        ):
            if hooks.get_hook(name) is not None:
                raise _cannot_slice(layer, told)


def _cannot_slice(layer: nn.Module, why: str) -> DyditError:
    kind = type(layer)
    return DyditError(
        f"Compact execution cannot slice a {kind.__module__}.{kind.__qualname__}.",
        why=f"{why}.",
        fix="Merge the adapter or undo what was attached, or call model.set_execution('dense') or ('static').",
    )
