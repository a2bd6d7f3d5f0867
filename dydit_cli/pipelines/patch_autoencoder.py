"""An autoencoder without weights: blocks of pixels become channels, and back.

FLUX's transformer packs 2 x 2 latent pixels into a token. On pixels this gives a small picture four times the tokens that it needs;
so a small pixel-space model takes 2 x 2 blocks of pixels for latent pixels, and its autoencoder is this rearrangement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

CERTAIN = -30.0
"""The log variance at which diffusers' distribution clamps: a deviation of 3e-7."""


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Space to depth, with the interface that pipelines use of `AutoencoderKL`.

    The import path of this class is recorded in saved pipelines and does not change.

    Args:
        image_channels: Channels of the images, 1 or 3.
        patch_size: Side of a block.
        latent_channels: ``image_channels * patch_size ** 2``; as a default computed from them.
        block_out_channels: As many entries as `AutoencoderKL` of this reduction would have; pipelines count them.
        scaling_factor: What pipelines divide latents by.
        shift_factor: What they add then.
    """

    unit: Tensor

    @register_to_config
    def __init__(
        self,
        image_channels: int = 1,
        patch_size: int = 2,
        latent_channels: int | None = None,
        block_out_channels: tuple[int, ...] = (1, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_to_config(latent_channels=image_channels * patch_size**2)
        # diffusers asks a model for its device, its dtype and a weight file, so it must hold one tensor.
        self.register_buffer("unit", torch.ones(()))

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """(B, C, H, W) images -> (B, C * p * p, H / p, W / p), as a distribution without spread."""
        latents = F.pixel_unshuffle(x, self.config.patch_size)
        posterior = DiagonalGaussianDistribution(
            torch.cat([latents, torch.full_like(latents, CERTAIN)], dim=1)
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The way back."""
        images = F.pixel_shuffle(z, self.config.patch_size)
        return DecoderOutput(sample=images) if return_dict else (images,)
