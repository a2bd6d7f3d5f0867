"""A stock FluxPipeline of tiny parts, and LoRA files for its transformer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn

from tests.tiny import tiny_model

RANK = 3
LAYERS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "norm1.linear",
    "norm.linear",
    "proj_mlp",
    "proj_out",
)


def flux_pipeline(transformer: nn.Module | None = None, **changes: Any) -> FluxPipeline:
    """Without text encoders: prompts are handed over as embeddings."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    ).eval()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer or tiny_model("flux", **changes),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: FluxPipeline, height: int = 16, width: int = 16, steps: int = 4, **more: Any) -> Tensor:
    """Latents that a stock run gives, a function of its arguments."""
    draws = torch.Generator().manual_seed(1)
    dtype = pipeline.transformer.dtype

    def embeds(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(dtype)

    keywords: dict[str, Any] = {
        "prompt_embeds": embeds(1, 5, 20),
        "pooled_prompt_embeds": embeds(1, 12),
        "negative_prompt_embeds": embeds(1, 5, 20),
        "negative_pooled_prompt_embeds": embeds(1, 12),
        "true_cfg_scale": 3.0,
        "guidance_scale": 3.5,
        "num_images_per_prompt": 2,
        "output_type": "latent",
    }
    images: Tensor = pipeline(
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(2),
        **(keywords | more),
    ).images
    return images


def lora_file(seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """A LoRA as its makers save it, for every kind of layer, those that dynamic execution slices among them."""
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in tiny_model("flux").named_modules():
        if (
            isinstance(module, nn.Linear)
            and "_blocks." in name
            and name.endswith(LAYERS)
            and "_router" not in name
        ):
            rows, columns = module.weight.shape
            prefix = f"transformer.{name}"
            found[f"{prefix}.lora_A.weight"] = scale * torch.randn(RANK, columns, generator=draws)
            found[f"{prefix}.lora_B.weight"] = scale * torch.randn(rows, RANK, generator=draws)
    return found
