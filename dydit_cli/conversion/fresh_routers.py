"""Routers at the paper's start for a model that exists as shapes only (on torch's meta device)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fresh_routers(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Make the routers of ``model`` real, one after the other, and return their tensors in fp32 under the model's keys.

    Args:
        model: On the meta device; its routers are the modules whose name ends in ``_router``.
        seed: Of their xavier weights.
    """
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if name.endswith("_router"):
                module.to_empty(device="cpu").float()
                # Every router knows its own start; a module's type does not say so.
                module.reset_parameters()
                tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors
