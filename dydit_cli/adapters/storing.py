"""Adapters on disk: ordinary PEFT folders, and beside them what PEFT has no place for.

LoRA: one PEFT folder. TD-LoRA: N of them, ``expert_0`` ... ``expert_{N-1}``, which share A, so that each loads in stock peft and
the N together, scaled by a_i(t), are the TD-LoRA. ``gates.safetensors`` holds the gates and the routers, which train with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.adapters.attaching import ADAPTER, AdapterSettings, adapted_layers, attach
from dydit_cli.adapters.td_lora import TDLoraLinear
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel

SCHEMA = 1
SETTINGS = "dydit_adapter.json"
GATES = "gates.safetensors"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def save_adapters(
    model: DynamicModel, folder: Path, settings: AdapterSettings, base: Mapping[str, str] | None = None
) -> None:
    """Write the adapters and routers of ``model`` into an existing, empty folder.

    Args:
        model: With what `attach` attached.
        folder: Where.
        settings: What was attached.
        base: What is known of the weights that they belong to, such as their hash.
    """
    layers = dict(adapted_layers(model))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,
        target_modules=list(layers),
        bias="none",
        inference_mode=True,
    )
    beside = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if "_router." in name
    }
    for number in range(settings.experts if settings.kind == "td-lora" else 1):
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            second = layer.lora_B[ADAPTER].weight
            if isinstance(layer, TDLoraLinear):
                second = layer.experts(ADAPTER)[number]
                gate: Any = layer.lora_gate[ADAPTER]
                beside |= {
                    f"{name}.lora_gate.{part}": value.detach() for part, value in gate.named_parameters()
                }
            # Cloned: safetensors refuses tensors that share their storage.
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach().clone()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = second.detach().clone()
        place = folder / f"expert_{number}" if settings.kind == "td-lora" else folder
        place.mkdir(exist_ok=True)
        config.save_pretrained(str(place))
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    save_file(
        {key: value.clone() for key, value in beside.items()}, folder / GATES, metadata={"format": "pt"}
    )
    said = {
        "schema": SCHEMA,
        "kind": settings.kind,
        "rank": settings.rank,
        "alpha": settings.scale * settings.rank,
        "experts": settings.experts if settings.kind == "td-lora" else None,
        "family": model.family,
        **(base or {}),
    }
    (folder / SETTINGS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> AdapterSettings:
    """Read what `save_adapters` wrote about a folder.

    Raises:
        DyditError: If it is no such folder.
    """
    try:
        said = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if said["schema"] != SCHEMA:
            raise ValueError(f"schema {said['schema']}, this version reads {SCHEMA}")
        return AdapterSettings(
            said["kind"], int(said["rank"]), float(said["alpha"]), int(said["experts"] or 1)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DyditError(
            f"{folder} holds no adapters of dydit.",
            why=f"{SETTINGS} is missing or not readable: {error}",
            fix="Pass the folder that `dydit finetune` wrote with method lora or td-lora.",
        ) from error


def load_adapters(model: DynamicModel, folder: Path) -> AdapterSettings:
    """Attach the adapters of ``folder`` to ``model``, with their routers.

    Raises:
        DyditError: If they are damaged or belong to another model.
    """
    settings = read_settings(folder)
    attach(model, settings)
    places = [folder]
    if settings.kind == "td-lora":
        places = [folder / f"expert_{number}" for number in range(settings.experts)]
    experts = [_tensors(place / WEIGHTS) for place in places]
    beside = _tensors(folder / GATES)
    state = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, layer in adapted_layers(model):
                key = f"{PEFT_PREFIX}{name}"
                layer.lora_A[ADAPTER].weight.copy_(experts[0][f"{key}.lora_A.weight"])
                seconds = [expert[f"{key}.lora_B.weight"] for expert in experts]
                layer.lora_B[ADAPTER].weight.copy_(torch.cat(seconds))
                if isinstance(layer, TDLoraLinear):
                    gate: Any = layer.lora_gate[ADAPTER]
                    for part, value in gate.named_parameters():
                        value.copy_(beside[f"{name}.lora_gate.{part}"])
            for name, value in beside.items():
                if "_router." in name:
                    state[name].copy_(value)
    except (KeyError, RuntimeError) as error:
        raise DyditError(
            f"The adapters in {folder} do not fit this model.",
            why=f"Made for another one, or damaged: {str(error).splitlines()[0][:160]}",
            fix="Load them on the model that they were trained on.",
        ) from error
    return settings


def _tensors(file: Path) -> Mapping[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}
    except (OSError, SafetensorError) as error:
        raise DyditError(
            f"{file} cannot be read.",
            why=str(error)[:160],
            fix="Copy the folder of the adapters again.",
        ) from error
