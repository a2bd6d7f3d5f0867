"""Make a FLUX checkpoint of full size that takes no room: a valid header, and holes that read as zeros.

    python scripts/make_sparse_flux.py flux1-dev.safetensors

The file is as long as the published one (23.8 GB in bf16) and is opened, listed and read like it. The value and output projections
of the first and last blocks hold random numbers, so that a ranking has something to rank there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import FluxTransformer2DModel

from dydit_cli.artifacts.tensor_files import write_at, write_header
from dydit_cli.checkpoints.layout import Rearranged
from dydit_cli.checkpoints.lazy import TensorSpec, lazily
from dydit_cli.families.original_flux import to_original

SCALE = 0.02


def specs_of(config: dict[str, object], layout: str, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Shapes of a FLUX in one of its layouts, in the order of its file."""
    with torch.device("meta"):
        state = FluxTransformer2DModel(**config).state_dict()
    specs = lazily(state).specs
    if layout == "original":
        specs = Rearranged(state, to_original(specs)).specs
    return {key: TensorSpec(spec.shape, dtype) for key, spec in specs.items()}


def filled(key: str, depth: int, single_depth: int) -> bool:
    """Whether a tensor gets random numbers: what is ranked in the first and last block of each kind."""
    blocks = [f"double_blocks.{index}." for index in {0, depth - 1}]
    blocks += [f"single_blocks.{index}." for index in {0, single_depth - 1}]
    blocks += [f"transformer_blocks.{index}." for index in {0, depth - 1}]
    blocks += [f"single_transformer_blocks.{index}." for index in {0, single_depth - 1}]
    names = (
        "qkv",
        "attn.proj",
        "mlp",
        "linear1",
        "linear2",
        "to_v",
        "to_out",
        "add_v",
        "to_add_out",
        "ff",
        "proj_",
    )
    return key.endswith(".weight") and key.startswith(tuple(blocks)) and any(name in key for name in names)


def write(path: Path, specs: dict[str, TensorSpec], depth: int, single_depth: int) -> int:
    """Write one file and return how many tensors were filled."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    with path.open("wb") as file:
        places = write_header(file, specs)
        for key, spec in specs.items():
            if filled(key, depth, single_depth):
                write_at(
                    file, places[key], (SCALE * torch.randn(spec.shape, generator=generator)).to(spec.dtype)
                )
                count += 1
    return count


def main() -> None:
    """Write the file and say how large it looks and is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--depth", type=int, default=19, help="double blocks")
    parser.add_argument("--single-depth", type=int, default=38, help="single blocks")
    parser.add_argument("--heads", type=int, default=24, help="heads of 128 channels")
    parser.add_argument("--layout", choices=("original", "diffusers"), default="original")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32", "float8_e4m3fn"), default="bfloat16"
    )
    settings = parser.parse_args()
    config = {
        "num_layers": settings.depth,
        "num_single_layers": settings.single_depth,
        "num_attention_heads": settings.heads,
        "guidance_embeds": True,
    }
    specs = specs_of(config, settings.layout, getattr(torch, settings.dtype))
    count = write(settings.out, specs, settings.depth, settings.single_depth)
    status = settings.out.stat()
    numbers = sum(spec.numel for spec in specs.values())
    print(
        f"{settings.out}: {len(specs)} tensors of {numbers:,} numbers, {count} filled; "
        f"{status.st_size / 1e9:.2f} GB long, {status.st_blocks * 512 / 1e9:.2f} GB on disk"
    )


if __name__ == "__main__":
    main()
