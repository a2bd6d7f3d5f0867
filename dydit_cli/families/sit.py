"""SiT (willisma/SiT): DiT's backbone and keys, trained to predict the velocity of a linear interpolant.

x_t = t * data + (1 - t) * noise, v = data - noise; t in [0, 1], data lies at t = 1.
"""

from __future__ import annotations

from torch import Tensor

from dydit_cli.families.backbone import DynamicTransformer


class DySiTTransformer2DModel(DynamicTransformer):
    """A dynamic SiT. ``timestep`` is in [0, 1], 1 is data; the prediction is the velocity, in the input's channels.

    The import path of this class is recorded in exported pipelines and does not change.
    """

    family = "sit"

    def channels_returned(self, computed: int) -> int:
        """The input's channels: the original discards the second half that a learned sigma would add."""
        return int(self.config["in_channels"])

    def native_prediction(self, sample: Tensor) -> Tensor:
        """Drop the channels that the original drops."""
        return sample[:, : self.geometry.in_channels]


class DySiTPipelineTransformer2DModel(DySiTTransformer2DModel):
    """The same weights in the convention of diffusers' flow-matching schedulers, for stock pipelines.

    There ``timestep`` is 0 ... 1000 with data at 0, and the prediction is noise - data.
    """

    def native_timestep(self, timestep: Tensor) -> Tensor:
        """t = 1 - timestep / 1000."""
        return 1 - timestep.float() / 1000

    def given_timestep(self, native: float) -> float:
        """The inverse."""
        return (1 - native) * 1000

    def native_prediction(self, sample: Tensor) -> Tensor:
        """Turn the velocity towards the noise."""
        return -super().native_prediction(sample)
