"""Make a LoRA file of the shapes of a full-size FLUX, as trainers write it: for trying `dydit convert --lora` at real size.

    python scripts/make_flux_lora.py lora.safetensors --rank 16

It changes the projections of attention and the MLPs of every block, under diffusers' names, in bf16. The numbers are random and
small; neither side is zero, so that the merged weights differ from the base's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLPS = ("net.0.proj", "net.2", "proj_mlp", "proj_out")
SCALE = 0.01


def pairs(config: dict[str, object], rank: int) -> dict[str, Tensor]:
    """Both matrices of every layer in a block."""
    with torch.device("meta"):
        state = FluxTransformer2DModel(**config).state_dict()
    generator = torch.Generator().manual_seed(0)
    content: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if "transformer_blocks." not in key or not layer.endswith((*LAYERS, *MLPS)) or layer == key:
            continue
        rows, columns = tensor.shape
        for side, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            numbers = SCALE * torch.randn(shape, generator=generator)
            content[f"transformer.{layer}.{side}.weight"] = numbers.to(torch.bfloat16)
    return content


def main() -> None:
    """Write the file and say what is in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--depth", type=int, default=19, help="double blocks")
    parser.add_argument("--single-depth", type=int, default=38, help="single blocks")
    parser.add_argument("--heads", type=int, default=24, help="heads of 128 channels")
    settings = parser.parse_args()
    config = {
        "num_layers": settings.depth,
        "num_single_layers": settings.single_depth,
        "num_attention_heads": settings.heads,
        "guidance_embeds": True,
    }
    content = pairs(config, settings.rank)
    save_file(content, settings.out)
    size = settings.out.stat().st_size / 1e6
    print(f"{settings.out}: {len(content) // 2} layers at rank {settings.rank}, {size:.0f} MB")


if __name__ == "__main__":
    main()
