"""From samples to pixels: pixel-space models need nothing, latent-space models an autoencoder from a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.pipelines.autoencoder import autoencoder_config

PIXEL_CHANNELS = (1, 3)
ROUNDING = "(x + 1) * 127.5, rounded to the nearest integer (halves to even), clamped to 0 ... 255"


def makes_pixels(channels: int) -> bool:
    """Whether a model with so many input channels works on pixels (grey or RGB); others work on latents (4 in the papers)."""
    return channels in PIXEL_CHANNELS


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) bytes on the CPU; rounded as `ROUNDING` says, on the device that computed them."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


class Decoder(Protocol):
    """What makes pixels of latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents at the model's scale -> (B, 1 or 3, H, W) pixels in about [-1, 1]."""
        ...


@dataclass(frozen=True)
class VaeDecoder:
    """A Stable-Diffusion-like autoencoder's decoder.

    Attributes:
        vae: diffusers' AutoencoderKL.
        scaling_factor: What latents were multiplied by for the model.
        shift_factor: What was subtracted before.
        folder: Where it was read from.
    """

    vae: Any
    scaling_factor: float
    shift_factor: float
    folder: Path

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents at the model's scale -> (B, 3, H, W) pixels in about [-1, 1]."""
        pixels: Tensor = self.vae.decode(
            latents.to(self.vae.dtype) / self.scaling_factor + self.shift_factor
        ).sample
        return pixels


def vae_config(folder: Path, channels: int) -> tuple[Path, dict[str, Any]]:
    """Check that ``folder`` (or its ``vae/``) holds an AutoencoderKL for latents of ``channels``, before anything is computed.

    Returns:
        The folder that holds it and its configuration.

    Raises:
        DyditError: If it does not, or if the model makes pixels.
    """
    if makes_pixels(channels):
        raise DyditError(
            "This model needs no autoencoder.",
            why=f"It makes pixels ({channels} channel{'s' if channels > 1 else ''}), not latents.",
            fix="Leave out --vae.",
        )
    found, config = autoencoder_config(folder, ("AutoencoderKL",))
    latent_channels = int(config.get("latent_channels", 4))
    if latent_channels != channels:
        raise DyditError(
            f"The autoencoder at {found} does not fit the model.",
            why=f"It decodes latents of {latent_channels} channels; the model makes {channels}.",
            fix="Pass the autoencoder that the model was trained with (sd-vae-ft-ema or -mse for DiT and SiT).",
        )
    return found, config


def open_vae(folder: str | Path, channels: int, device: torch.device) -> VaeDecoder:
    """Load a decoder, in fp32 whatever the model runs in: half precision overflows in the usual autoencoders.

    Raises:
        DyditError: As `vae_config`, or if the weights cannot be loaded.
    """
    from diffusers import AutoencoderKL

    found, _ = vae_config(Path(folder).expanduser(), channels)
    try:
        vae = AutoencoderKL.from_pretrained(str(found), torch_dtype=torch.float32, local_files_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DyditError(
            f"The autoencoder at {found} cannot be loaded.",
            why=f"A weight file is missing, damaged or does not fit config.json: {said}",
            fix="Copy the folder again.",
        ) from error
    vae = vae.to(device).eval().requires_grad_(False)
    # One image at a time: a batch of decoded images needs far more memory than the model did.
    vae.enable_slicing()
    return VaeDecoder(vae, float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0), found)
