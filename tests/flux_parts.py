"""A tiny FLUX that fits the shipped text encoders and autoencoder, and small collections of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dydit_cli.artifacts import save_model
from dydit_cli.families.flux import DyFluxTransformer2DModel
from dydit_cli.families.registry import family_named
from dydit_cli.preparation.prepare import PrepareReport, prepare
from dydit_cli.recipe.schema import PrepareSection

PIPELINE = "builtin:flux_fmnist"
CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (2, 2, 4),
    "sample_size": 4,
    "text_tokens": 7,
}


def small_flux(seed: int = 0, **changes: Any) -> DyFluxTransformer2DModel:
    """Random throughout, routers near even odds."""
    torch.manual_seed(seed)
    model: DyFluxTransformer2DModel = family_named("flux").build(CONFIG | changes)  # type: ignore[assignment]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_router." in name:
                if name.endswith("bias"):
                    parameter.fill_(0.3)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def saved_flux(folder: Path, **changes: Any) -> Path:
    """The same as a folder."""
    save_model(small_flux(**changes), folder)
    return folder


def write_pictures(folder: Path, sizes: list[tuple[int, int]], captions: str = "txt") -> Path:
    """Noisy pictures ``00.png``, ... with captions in ``.txt`` files or in ``metadata.jsonl``."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate(sizes):
        name, caption = f"{number:02d}.png", ("a sneaker", "a coat", "a bag")[number % 3]
        Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8)).save(folder / name)
        if captions == "txt":
            (folder / name).with_suffix(".txt").write_text(caption)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    if captions == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def prepared(out: Path, **changes: Any) -> PrepareReport:
    """A cache of pictures with the shipped pipeline."""
    values: dict[str, Any] = {"pipeline": PIPELINE, "resolution": 8, "out": str(out), "device": "cpu"}
    return prepare(PrepareSection.model_validate(values | changes))


def stock_pipeline(folder: Path, **changes: Any) -> Any:
    """diffusers' own pipeline of the shipped parts and a static tiny transformer, saved into ``folder``."""
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    from dydit_cli.pipelines.folder import open_pipeline

    shipped = open_pipeline(PIPELINE)
    names = ("sample_size", "text_tokens")
    config = {name: value for name, value in (CONFIG | changes).items() if name not in names}
    model = small_flux(**changes)
    transformer = FluxTransformer2DModel(**config)
    static = transformer.state_dict()
    transformer.load_state_dict({key: value for key, value in model.state_dict().items() if key in static})
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.1,
    )
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(str(shipped.part("scheduler"))),
        vae=vae.eval(),
        text_encoder=CLIPTextModel.from_pretrained(str(shipped.part("text_encoder"))).eval(),
        tokenizer=AutoTokenizer.from_pretrained(str(shipped.part("tokenizer"))),
        text_encoder_2=T5EncoderModel.from_pretrained(str(shipped.part("text_encoder_2"))).eval(),
        tokenizer_2=AutoTokenizer.from_pretrained(str(shipped.part("tokenizer_2"))),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(str(folder))
    return pipe
