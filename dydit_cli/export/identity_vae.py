"""The autoencoder of a model that works on pixels: none. Stock pipelines always decode, so they get this."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """Returns what it is given, with the interface that `DiTPipeline` uses of `AutoencoderKL`.

    The import path of this class is recorded in saved pipelines and does not change.

    Args:
        latent_channels: Channels of the images, 1 or 3.
        scaling_factor: What pipelines divide latents by; 1 leaves them as they are.
    """

    unit: Tensor

    @register_to_config
    def __init__(self, latent_channels: int = 3, scaling_factor: float = 1.0) -> None:
        super().__init__()
        # diffusers asks a model for its device, its dtype and a weight file, so it must hold one tensor.
        self.register_buffer("unit", torch.ones(()))

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """(B, C, h, w) -> the same, as ``sample`` or in a tuple."""
        return DecoderOutput(sample=z) if return_dict else (z,)
