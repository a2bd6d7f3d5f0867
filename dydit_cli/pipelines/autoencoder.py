"""An autoencoder from a local folder: diffusers' AutoencoderKL, or the rearrangement of pixels that small models use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dydit_cli.errors import DyditError

KINDS = ("AutoencoderKL", "PatchAutoencoder")


@dataclass(frozen=True)
class Autoencoder:
    """A loaded autoencoder, in fp32: half precision overflows in the usual ones.

    Attributes:
        vae: diffusers' model.
        channels: C of its latents.
        image_channels: 1 or 3.
        reduction: Pixels of an image to one of its latents, on a side.
        scaling_factor: What latents are multiplied by for a model,
        shift_factor: after this was subtracted.
        posterior: Whether it gives a distribution with a spread.
        folder: Where it was read from.
    """

    vae: Any
    channels: int
    image_channels: int
    reduction: int
    scaling_factor: float
    shift_factor: float
    posterior: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = self.vae.device
        return device

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """(B, C_image, H, W) in [-1, 1] -> (B, 2C, h, w) means and log variances, or (B, C, h, w) latents without a spread."""
        distribution = self.vae.encode(pixels.to(self.device)).latent_dist
        if not self.posterior:
            mean: Tensor = distribution.mean
            return mean.cpu()
        return torch.cat([distribution.mean, distribution.logvar], dim=1).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents at a model's scale -> (B, C_image, H, W) pixels in about [-1, 1]."""
        stored = latents.to(self.device, self.vae.dtype) / self.scaling_factor + self.shift_factor
        pixels: Tensor = self.vae.decode(stored).sample
        return pixels


def autoencoder_config(folder: Path, kinds: Sequence[str] = KINDS) -> tuple[Path, dict[str, Any]]:
    """Check that ``folder``, or its ``vae/``, holds an autoencoder that can be used.

    Args:
        folder: A local folder.
        kinds: Class names that will do.

    Returns:
        The folder that holds it and its configuration.

    Raises:
        DyditError: if it does not.
    """
    found = next((place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None)
    if found is None:
        raise DyditError(
            f"There is no autoencoder at {folder}.",
            why="It has no config.json." if folder.is_dir() else "No such folder exists.",
            fix="Pass the local folder of an AutoencoderKL (config.json and diffusion_pytorch_model.safetensors).",
        )
    try:
        config = dict(json.loads((found / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DyditError(
            f"{found / 'config.json'} is damaged.",
            why=f"It cannot be read as JSON: {error}.",
            fix="Copy the folder again.",
        ) from error
    if config.get("_class_name") not in kinds:
        raise DyditError(
            f"{found} is not an autoencoder.",
            why=f"Its config.json describes a {config.get('_class_name', 'thing without _class_name')}.",
            fix="Pass the folder of an AutoencoderKL, for example sd-vae-ft-ema.",
        )
    return found, config


def open_autoencoder(folder: str | Path, device: torch.device) -> Autoencoder:
    """Load an autoencoder.

    Raises:
        DyditError: as `autoencoder_config`, or if the weights cannot be loaded.
    """
    found, config = autoencoder_config(Path(folder).expanduser())
    plain = config["_class_name"] == "PatchAutoencoder"
    try:
        vae = _class_of(plain).from_pretrained(
            str(found), torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DyditError(
            f"The autoencoder at {found} cannot be loaded.",
            why=f"A weight file is missing, damaged or does not fit config.json: {said}",
            fix="Copy the folder again.",
        ) from error
    vae = vae.to(device).eval().requires_grad_(False)
    if not plain:
        # One image at a time: a batch of decoded images needs far more memory than the model did.
        vae.enable_slicing()
    return Autoencoder(
        vae=vae,
        channels=int(vae.config.latent_channels),
        image_channels=int(vae.config.image_channels if plain else vae.config.in_channels),
        reduction=2 ** (len(vae.config.block_out_channels) - 1),
        scaling_factor=float(vae.config.scaling_factor),
        shift_factor=float(vae.config.shift_factor or 0.0),
        posterior=not plain,
        folder=found,
    )


def _class_of(plain: bool) -> Any:
    if plain:
        from dydit_cli.pipelines.patch_autoencoder import PatchAutoencoder

        return PatchAutoencoder
    from diffusers import AutoencoderKL

    return AutoencoderKL
