"""How a run trains its model: all weights, or adapters on weights that stay as they are (LoRA, TD-LoRA) beside the routers.

What does not change is held once: the moving average shares it, a teacher is made of it, checkpoints leave it out and name it by
its hash. peft is imported where adapters are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dydit_cli.artifacts import save_model
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.artifacts.manifest import weights_hash
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.recipe.schema import FinetuneSection

if TYPE_CHECKING:
    from dydit_cli.adapters.attaching import AdapterSettings

ADAPTER_FOLDER = "adapter"
"""In the artifact of a run with adapters: ordinary PEFT folders of them."""


def adapter_settings(settings: FinetuneSection) -> AdapterSettings | None:
    """What a run attaches; None if all weights train."""
    if settings.method == "full":
        return None
    from dydit_cli.adapters.attaching import AdapterSettings

    return AdapterSettings(
        kind=settings.method,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        experts=settings.lora_experts,
        dropout=settings.lora_dropout,
    )


def begin_method(settings: FinetuneSection, model: DynamicModel) -> None:
    """Attach what the method asks for. Weights are frozen; routers train if they did before.

    Raises:
        DyditError: If the model has adapters already.
    """
    chosen = adapter_settings(settings)
    if chosen is None:
        return
    from dydit_cli.adapters.attaching import attach
    from dydit_cli.adapters.bases import compress_base

    learns = {id(parameter): parameter.requires_grad for parameter in model.router_parameters()}
    attach(model, chosen, seed=settings.seed)
    compress_base(model, settings.base)
    for parameter in model.router_parameters():
        parameter.requires_grad_(learns[id(parameter)])


def is_adapted(model: DynamicModel) -> bool:
    """Whether `begin_method` attached something."""
    return any(_is_adapter(name) for name, _ in model.named_parameters())


def shared_tensors(model: DynamicModel) -> dict[int, Tensor]:
    """For `copy.deepcopy`: what a copy that follows the model shares with it. Nothing, if all weights train."""
    if not is_adapted(model):
        return {}
    named = (*model.named_parameters(), *model.named_buffers())
    return {id(tensor): tensor for name, tensor in named if not _changes(name)}


def below(model: DynamicModel) -> DynamicModel:
    """The model without its adapters, on the same weights; itself if it has none."""
    if not is_adapted(model):
        return model
    from dydit_cli.adapters.plain import below_adapters

    return below_adapters(model)


def changing_state(model: DynamicModel) -> dict[str, Tensor]:
    """The part of a state dict that a run changes: all of it, or adapters and routers."""
    state: dict[str, Tensor] = model.state_dict()
    if not is_adapted(model):
        return state
    return {name: tensor for name, tensor in state.items() if _changes(name)}


def with_frozen_state(model: DynamicModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict of what `changing_state` gave and what the model has.

    Raises:
        KeyError: If it is not what `changing_state` gives.
    """
    missing = sorted(changing_state(model).keys() - tensors.keys())
    if missing:
        raise KeyError(missing[0])
    return {**model.state_dict(), **tensors}


def base_facts(settings: FinetuneSection) -> dict[str, str]:
    """What checkpoints with adapters say of the weights that they leave out; nothing where they hold all."""
    if settings.method == "full":
        return {}
    return {"base": settings.base, "base_sha256": weights_hash(model_folder(settings.model))}


def check_base(facts: Mapping[str, Any], now: Mapping[str, Any], settings: FinetuneSection) -> None:
    """See that the weights are those that a checkpoint's adapters were trained on.

    Raises:
        DyditError: If not.
    """
    if facts.get("base_sha256") != now.get("base_sha256"):
        raise DyditError(
            f"The weights in {settings.model} changed since the run was started.",
            why="Checkpoints of adapters hold what trains and not the weights below it, which are read from there.",
            fix="Restore that folder, or start a new run in another --out.",
        )


def save_result(model: DynamicModel, folder: Path, settings: FinetuneSection) -> None:
    """Save what a run made, so that the folder needs no other: weights with LoRA merged, or with the experts of TD-LoRA beside.

    The adapters themselves are put beside the weights, as PEFT reads them.
    """
    chosen = adapter_settings(settings)
    if chosen is None:
        save_model(model, folder)
        return
    from dydit_cli.adapters.plain import without_wrappers
    from dydit_cli.adapters.storing import save_adapters

    with torch.no_grad():
        save_model(without_wrappers(model), folder)
    beside = folder / ADAPTER_FOLDER
    beside.mkdir()
    save_adapters(model, beside, chosen, base=base_facts(settings))


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _changes(name: str) -> bool:
    return _is_adapter(name) or "_router." in name
