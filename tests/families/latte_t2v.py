"""Text-to-video Lattes of diffusers' own class with random weights, ours with the same weights, and a pipeline around them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from torch import Tensor, nn

from dydit_cli.families.family import reset_routers
from dydit_cli.families.latte_t2v import DyLatteT2VTransformer3DModel
from tests.tiny import Balancing, tiny_inputs

CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "norm_eps": 1e-6,
    "caption_channels": 32,
    "video_length": 3,
}
FIXED = {
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
}
WORDS = ("<pad>", "</s>", "<unk>", "a", "dog", "runs", "in", "the", "snow")


def stock_model(seed: int = 0, **changes: Any) -> LatteTransformer3DModel:
    """diffusers' class, random throughout."""
    config = CONFIG | changes
    width = config["num_attention_heads"] * config["attention_head_dim"]
    model = LatteTransformer3DModel(**config, cross_attention_dim=width, **FIXED).eval()
    return randomised(model, seed)


def randomised(model: nn.Module, seed: int) -> Any:
    """The model with small random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def dynamic_model(stock: LatteTransformer3DModel, balanced: bool = False) -> DyLatteT2VTransformer3DModel:
    """Ours with the weights of diffusers' class; routers keep everything, or about half if ``balanced``."""
    config = {name: stock.config[name] for name in CONFIG}
    generator = torch.Generator().manual_seed(1)
    model = DyLatteT2VTransformer3DModel(**config, text_tokens=6).eval()
    missing, extra = model.load_state_dict(stock.state_dict(), strict=False)
    assert not extra
    assert all("_router." in key or key.endswith("_order") for key in missing)
    reset_routers(model)
    if balanced:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_router." in name:
                    parameter.copy_(0.75 * torch.randn(parameter.shape, generator=generator))
            for name, order in model.named_buffers():
                if name.endswith("_order"):
                    order.copy_(torch.randperm(len(order), generator=generator))
            model.denoise(*tiny_inputs(model, 8), gating=Balancing(model, generator))
    return model.requires_grad_(False)


def arguments(
    batch: int = 2, frames: int = 3, tokens: int = 6, seed: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, timesteps and prompt embeddings."""
    generator = torch.Generator().manual_seed(seed)
    side, channels = CONFIG["sample_size"], CONFIG["in_channels"]
    return (
        torch.randn(batch, channels, frames, side, side, generator=generator),
        torch.linspace(40, 900, batch).long(),
        torch.randn(batch, tokens, CONFIG["caption_channels"], generator=generator),
    )


def stock_pipeline(transformer: Any) -> LattePipeline:
    """diffusers' pipeline of tiny parts; the tokenizer knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    settings = T5Config(
        vocab_size=len(WORDS), d_model=CONFIG["caption_channels"], d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = LattePipeline(
        tokenizer=tokenizer,
        text_encoder=randomised(T5EncoderModel(settings).eval(), 3),
        vae=randomised(vae.eval(), 4),
        transformer=transformer,
        scheduler=DDIMScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: LattePipeline, **options: Any) -> Tensor:
    """(B, F, 3, H, W) frames of a guided run."""
    settings: dict[str, Any] = {
        "prompt": "a dog runs in the snow",
        "negative_prompt": "",
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "video_length": CONFIG["video_length"],
        # Given, because the pipeline's default is the published model's 512 pixels; the tiny autoencoder halves.
        "height": 2 * CONFIG["sample_size"],
        "width": 2 * CONFIG["sample_size"],
        "clean_caption": False,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(5),
    }
    frames: Tensor = pipeline(**(settings | options)).frames
    return frames
