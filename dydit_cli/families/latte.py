"""Latte (Vchitect/Latte, models/latte.py): a DiT of videos whose blocks attend inside a frame and along the frames in turn.

Source: Ma et al., "Latte: Latent Diffusion Transformer for Video Generation" (arXiv 2401.03048), the class-conditional and the
unconditional form; checked against outputs of the original implementation. The text-to-video form is a model of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dydit_cli.dynamic.layers import AcrossFrames, Sequences, WithinFrames
from dydit_cli.errors import DyditError
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.blocks import LabelEmbedder


class DyLatteTransformer3DModel(DynamicTransformer):
    """A dynamic Latte. ``timestep`` is 0 ... 999; the prediction is noise, then variance values where the model learned them.

    Samples are (B, F, C_in, h, w), predictions (B, F, C_out, h, w). In memory the tokens of a video stand in one row, frame after
    frame; blocks with an even number attend inside a frame, the others along the frames at a place. Widths are those of the
    timestep in both kinds of block, and the token routers see all tokens of a video.

    The import path of this class is recorded in exports and does not change.

    Args:
        sample_size: Side of a square frame in latent pixels.
        patch_size: Side of a patch.
        in_channels: Channels of a frame.
        hidden_size: C.
        num_layers: Blocks of both kinds together. (The original has an even number of them.)
        num_attention_heads: H; divides ``hidden_size``.
        num_classes: Classes without the null class; 0 for an unconditional model.
        num_frames: F.
        mlp_hidden_size: Hidden channels of the MLP; None means 4C.
        learn_sigma: Whether the final layer computes a variance beside each input channel.
        num_groups: G; None means H. Divides ``mlp_hidden_size``.
        always_on: Whether the most important head and group have no router row and are always on.
        out_channels: Channels that a forward returns. It follows from the others.
        width, budgets, default_budget, td_lora, baked: See `DynamicTransformer`.

    Raises:
        DyditError: If the numbers do not fit together.
    """

    family = "latte"
    guided_channels = 4

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        num_classes: int = 101,
        num_frames: int = 16,
        mlp_hidden_size: int | None = None,
        learn_sigma: bool = True,
        num_groups: int | None = None,
        always_on: bool = True,
        out_channels: int | None = None,
        width: str = "free",
        budgets: Sequence[float] | None = None,
        default_budget: float | None = None,
        td_lora: Mapping[str, Any] | None = None,
        baked: Mapping[str, Any] | None = None,
    ) -> None:
        if num_frames < 1:
            raise DyditError(
                f"A video of {num_frames} frames is not possible.",
                why="The table of frames has one entry a frame.",
                fix="Set num_frames to 1 or more.",
            )
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_classes=num_classes,
            mlp_hidden_size=mlp_hidden_size,
            learn_sigma=learn_sigma,
            num_groups=num_groups,
            always_on=always_on,
            out_channels=out_channels,
            width=width,
            budgets=budgets,
            default_budget=default_budget,
            td_lora=td_lora,
            baked=baked,
        )
        # As the original: a parameter without gradient, part of its files.
        self.temp_embed = nn.Parameter(torch.zeros(1, num_frames, hidden_size), requires_grad=False)

    @property
    def num_frames(self) -> int:
        """F."""
        return int(self.config["num_frames"])

    def sequences_of(self, block: int) -> Sequences:
        """Spatial blocks have even numbers, temporal ones odd numbers."""
        return AcrossFrames(self.num_frames) if block % 2 else WithinFrames(self.num_frames)

    def make_label_embedder(self, num_classes: int, hidden_size: int) -> LabelEmbedder | None:
        """None in the unconditional form, which has no null class either."""
        return LabelEmbedder(num_classes, hidden_size) if num_classes else None

    def embed_sample(self, hidden_states: Tensor) -> Tensor:
        """(B, F, C_in, h, w) -> (B, F * N, C)."""
        frames = super().embed_sample(hidden_states.flatten(0, 1))
        return frames.unflatten(0, (-1, self.num_frames)).flatten(1, 2)

    def offset_of(self, block: int) -> Tensor | None:
        """The number of the frame is added once, to what the first temporal block receives."""
        if block != 1:
            return None
        return self.temp_embed.repeat_interleave(self.geometry.num_tokens // self.num_frames, dim=1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, F * N, p * p * C_out) -> (B, F, C_out, h, w)."""
        frames = super().unpatchify(patches.unflatten(1, (self.num_frames, -1)).flatten(0, 1))
        return frames.unflatten(0, (-1, self.num_frames))
