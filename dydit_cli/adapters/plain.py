"""A model with adapters as one without wrappers, for files and for teachers: LoRA merged, TD-LoRA as the model's own layers.

Both share every tensor that they do not change with the model that they are made from.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dydit_cli.adapters.attaching import ADAPTER, adapted_layers
from dydit_cli.adapters.td_lora import TDLoraLinear
from dydit_cli.dynamic.timed import TimedLinear
from dydit_cli.execution.effective import effective
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.timed_layers import put


def without_wrappers(model: DynamicModel) -> DynamicModel:
    """The same function of weights, without peft.

    Args:
        model: With adapters of `attach`, which it keeps.

    Returns:
        A model whose own files say everything: weights with LoRA merged into them, or experts beside them.
    """
    plain = _sharing(model)
    rank_and_experts: dict[str, int] = {}
    for name, layer in list(adapted_layers(plain)):
        if isinstance(layer, TDLoraLinear):
            made = as_timed(layer)
            rank_and_experts = {"rank": layer.r[ADAPTER], "experts": len(made.timed_experts)}
            put(plain, name, made)
        else:
            with torch.no_grad():
                put(plain, name, as_linear(layer))
    if rank_and_experts:
        plain.register_to_config(td_lora=rank_and_experts)
    del plain.peft_config
    return plain


def below_adapters(model: DynamicModel) -> DynamicModel:
    """The model that the adapters are attached to, without them."""
    below = _sharing(model)
    for name, layer in list(adapted_layers(below)):
        put(below, name, layer.base_layer)
    del below.peft_config
    return below


def _sharing(model: DynamicModel) -> DynamicModel:
    """A copy of the modules around the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def as_timed(layer: TDLoraLinear) -> TimedLinear:
    """A layer of peft's as one of the model's own, with the scale in its experts."""
    base, factor = cast(nn.Linear, layer.base_layer), layer.factor(ADAPTER)
    weight, _ = effective(layer)
    with torch.device("meta"):
        made = TimedLinear(
            base.in_features,
            base.out_features,
            base.bias is not None,
            len(factor.first),
            len(factor.experts),
            factor.gate_weight.shape[1],
        )
    # The very parameter, unless it is stored in another form.
    made.weight = weight if isinstance(weight, nn.Parameter) else _frozen(weight)
    if base.bias is not None:
        made.bias = base.bias
    made.timed_first = _frozen(factor.first)
    made.timed_experts = _frozen(factor.experts)
    made.timed_gate.weight = _frozen(factor.gate_weight)
    made.timed_gate.bias = _frozen(factor.gate_bias)
    return made.train(layer.training)


def as_linear(layer: nn.Module) -> nn.Linear:
    """A layer with LoRA as a linear layer with the weight that it computes with."""
    base = cast(nn.Linear, layer.base_layer)
    weight, _ = effective(layer)
    with torch.device("meta"):
        made = nn.Linear(base.in_features, base.out_features, base.bias is not None)
    made.weight = _frozen(weight)
    if base.bias is not None:
        made.bias = base.bias
    return made.train(layer.training)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)
