"""The shipped base models and a tiny random one, as the tests of losses and training use them."""

from __future__ import annotations

from pathlib import Path

import torch

import dydit_cli
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Hints
from dydit_cli.families.registry import family_named

MODELS = Path(dydit_cli.__file__).parent / "assets" / "models"
PARITY = Path(__file__).parent.parent / "parity"


def base_model(family_name: str) -> DynamicTransformer:
    """The shipped Fashion-MNIST model of a family, with untrained routers (everything on)."""
    family = family_named(family_name)
    source = family.read(
        torch.load(MODELS / f"{family_name}_fmnist.pt", weights_only=True), Hints(num_heads=8)
    )
    torch.manual_seed(0)
    model = family.build(source.config)
    missing, unexpected = model.load_state_dict(source.tensors, strict=False)
    assert not unexpected
    assert all("_router." in key or key.endswith("_order") for key in missing)
    return model


def tiny_model(family_name: str = "dit", **changes: int | bool) -> DynamicTransformer:
    """Two blocks of 32 channels on 16 tokens, every layer random and non-zero."""
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_classes": 3,
        "learn_sigma": family_name == "dit",
    } | changes
    torch.manual_seed(0)
    model = family_named(family_name).build(config)
    with torch.no_grad():
        for parameter in (*model.backbone_parameters(), model.pos_embed):
            parameter.normal_(std=0.1)
    return model
