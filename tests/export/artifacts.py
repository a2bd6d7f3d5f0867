"""Tiny artifacts to export: a static checkpoint, what conversion makes of it, and a trained model whose routers decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dydit_cli
from dydit_cli.artifacts import save_model, write_manifest
from dydit_cli.export.export import ExportReport, export
from dydit_cli.recipe.schema import ExportSection
from tests.tiny import tiny_model


def static_checkpoint(
    path: Path, family: str = "dit", dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, Tensor]:
    """Write a flat checkpoint of a tiny static model, and return its tensors."""
    state = tiny_model(family, **changes).state_dict()
    tensors = {
        key: tensor.to(dtype)
        for key, tensor in state.items()
        if "_router." not in key and not key.endswith("_order")
    }
    torch.save(tensors, path)
    return tensors


def converted(
    folder: Path, family: str = "dit", dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, Tensor]:
    """Convert a tiny checkpoint into ``folder``; return the checkpoint's tensors."""
    tensors = static_checkpoint(folder.with_suffix(".pt"), family, dtype, **changes)
    dydit_cli.convert(folder.with_suffix(".pt"), out=folder, family=family, num_heads=6)
    return tensors


def trained(folder: Path, family: str = "dit", *, classes: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write what fine-tuning would leave in ``folder``: weights whose routers keep about half, and a manifest."""
    folder.mkdir(parents=True)
    save_model(tiny_model(family, **changes), folder)
    write_manifest(
        folder,
        stage="finetune",
        settings={"target_ratio": 0.5, "data": "images/", "model": "c", "seed": 0},
        parent="/somewhere/else/c",
        results={"ratio": 0.512, "steps": 7, "data": {"kind": "image folder", "classes": list(classes)}},
    )
    return folder


def exported(model: Path, out: Path, kind: str = "diffusers", **settings: Any) -> ExportReport:
    """Export a model."""
    return export(ExportSection(model=str(model), out=out, format=kind, **settings))  # type: ignore[arg-type]


def tiny_vae(folder: Path, latent_channels: int = 4) -> Path:
    """Write an AutoencoderKL that halves the side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(str(folder))
    return folder
