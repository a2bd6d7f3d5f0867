"""AdamW with the routers in a parameter group of their own; with moments in 8 bits where bitsandbytes is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.training.sharding import like


def make_optimiser(
    model: DynamicModel,
    *,
    learning_rate: float,
    router_learning_rate: float,
    weight_decay: float,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over what requires a gradient; without any router that learns (the static control) there is one group.

    Args:
        model: What trains.
        learning_rate: Of the backbone.
        router_learning_rate: Of the routers.
        weight_decay: Of all.
        kind: ``adamw``, or ``adamw8bit`` (Dettmers et al., arXiv 2110.02861).

    Raises:
        DyditError: For ``adamw8bit`` where its package is not installed.
    """
    rates = ((model.backbone_parameters(), learning_rate), (model.router_parameters(), router_learning_rate))
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.requires_grad], "lr": rate}
        for parameters, rate in rates
    ]
    trained = [group for group in groups if group["params"]]
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if kind == "adamw" else _eight_bits()
    return make(trained, lr=learning_rate, weight_decay=weight_decay)


def _eight_bits() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise DyditError(
            "The optimiser adamw8bit is not installed.",
            why="Its moments in 8 bits are made by the package bitsandbytes, which Python does not find.",
            fix="Run `pip install bitsandbytes`, or set optimiser to adamw.",
        ) from error
    made: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return made


def state_by_name(optimiser: torch.optim.Optimizer, model: DynamicModel) -> dict[str, Tensor]:
    """The optimiser's tensors as ``<parameter>:<moment>``, so that they can be stored without pickle.

    A count that is a plain number becomes a tensor of int64. Tables that all parameters share (of moments in 8 bits) are copied:
    a safetensors file has no shared ones.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        for moment, value in optimiser.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value).detach().contiguous()
            shared = isinstance(value, Tensor) and id(value) in seen
            tensors[f"{name}:{moment}"] = tensor.clone() if shared else tensor
            seen.add(id(value))
    return tensors


def load_state_by_name(
    optimiser: torch.optim.Optimizer, model: DynamicModel, tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `state_by_name` gave.

    Raises:
        KeyError: if a tensor of a parameter that does not train is among them.
    """
    by_name: dict[str, dict[str, Any]] = {}
    places = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, moment = key.rsplit(":", 1)
        plain = tensor.ndim == 0 and tensor.dtype == torch.int64
        value = int(tensor) if plain else like(tensor, places.get(name, tensor))
        by_name.setdefault(name, {})[moment] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state = optimiser.state_dict()
    state["state"] = {
        number: by_name.pop(names[id(parameter)])
        for number, parameter in enumerate(trained)
        if names[id(parameter)] in by_name
    }
    if by_name:
        raise KeyError(next(iter(by_name)))
    optimiser.load_state_dict(state)
