"""DiT (facebookresearch/DiT): noise prediction in 1,000 steps, with a learned variance beside each channel."""

from __future__ import annotations

from dydit_cli.families.backbone import DynamicTransformer


class DyDiTTransformer2DModel(DynamicTransformer):
    """A dynamic DiT. ``timestep`` is 0 ... 999; the prediction is noise, then variance values where the model learned them.

    The import path of this class is recorded in exported pipelines and does not change.
    """

    family = "dit"
