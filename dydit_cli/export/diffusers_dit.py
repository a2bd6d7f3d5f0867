"""The configuration beside the static weights of a model that came from diffusers' `DiTTransformer2DModel`: the way back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from dydit_cli.artifacts import write_json
from dydit_cli.families.dit_files import diffusers_config

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
CLASS = "DiTTransformer2DModel"


def write_class_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the ``config.json`` with which diffusers' class loads the weights of ``folder``.

    Args:
        folder: Of the export.
        config: Of our model.
    """
    content = {"_class_name": CLASS, "_diffusers_version": diffusers.__version__, **diffusers_config(config)}
    write_json(folder / "config.json", content)
