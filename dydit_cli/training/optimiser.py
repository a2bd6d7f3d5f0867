"""AdamW with the routers in a parameter group of their own."""

from __future__ import annotations

from typing import Any

import torch

from dydit_cli.families.dynamic_model import DynamicModel


def make_optimiser(
    model: DynamicModel, *, learning_rate: float, router_learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; frozen routers (the static control) have no group."""
    groups: list[dict[str, Any]] = [
        {"params": model.backbone_parameters(), "lr": learning_rate},
        {"params": model.router_parameters(), "lr": router_learning_rate},
    ]
    trained = [group for group in groups if all(parameter.requires_grad for parameter in group["params"])]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)


def state_by_name(optimiser: torch.optim.Optimizer, model: DynamicModel) -> dict[str, torch.Tensor]:
    """The optimiser's tensors as ``<parameter>:<moment>``, so that they can be stored without pickle."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{name}:{moment}"] = value.detach().contiguous()
    return tensors


def load_state_by_name(
    optimiser: torch.optim.Optimizer, model: DynamicModel, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore what `state_by_name` gave.

    Raises:
        KeyError: if a tensor of a parameter that does not train is among them.
    """
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit(":", 1)
        by_name.setdefault(name, {})[moment] = tensor
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
