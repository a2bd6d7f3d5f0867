"""The three routers of a dynamic block. They give fp32 logits; gates (`dynamic/gates.py`) make masks of them.

Width (TDW): `HeadRouter` and `ChannelRouter` read the timestep embedding alone, so the widths of a whole schedule are known
before sampling. Tokens (SDT): `TokenRouter` reads the residual stream after the attention residual.

Source: DyDiT (arXiv 2410.03456), section 3; starting values as in the authors' released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH_BIAS = 15.0
TOKEN_BIAS = 35.0


def fp32_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Apply ``layer`` in fp32 whatever its dtype and whatever autocast says: a decision must not depend on rounding."""
    if not torch.is_autocast_enabled(inputs.device.type):
        # Entering and leaving a context takes as long as the product of a small model.
        return F.linear(inputs.float(), layer.weight.float(), layer.bias.float())
    with torch.autocast(device_type=inputs.device.type, enabled=False):
        return F.linear(inputs.float(), layer.weight.float(), layer.bias.float())


class WidthRouter(nn.Module):
    """Linear(C, R) on the timestep embedding. With an always-on unit R = units - 1, and a one is put in front of the mask.

    Args:
        hidden_size: C.
        units: Number of heads or channel groups.
        always_on: Whether the first (most important) unit has no router row and is always on.
    """

    def __init__(self, hidden_size: int, units: int, always_on: bool) -> None:
        super().__init__()
        self.units = units
        self.always_on = always_on
        self.linear = nn.Linear(hidden_size, units - int(always_on))

    def reset_parameters(self) -> None:
        """Xavier weights and a bias of 15, so that fine-tuning starts from the complete model."""
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.constant_(self.linear.bias, WIDTH_BIAS)

    def forward(self, time_embedding: Tensor) -> Tensor:
        """(B, C) timestep embedding -> (B, R) fp32 logits."""
        return fp32_linear(self.linear, time_embedding)

    def complete(self, mask: Tensor) -> Tensor:
        """Put the always-on unit in front of a (B, R) mask -> (B, units); a mask that has it already passes unchanged."""
        if mask.shape[1] == self.units:
            return mask
        return torch.cat(
            [torch.ones_like(mask[:, :1]) if mask.shape[1] else mask.new_ones(len(mask), 1), mask], dim=1
        )


class HeadRouter(WidthRouter):
    """TDW over attention heads."""


class ChannelRouter(WidthRouter):
    """TDW over the channel groups of the MLP."""


class TokenRouter(nn.Module):
    """SDT: Linear(C, C/16) -> ReLU -> Linear(C/16, 1) on every token of the residual stream (not normalised, not modulated)."""

    def __init__(self, hidden_size: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(1, hidden_size // reduction)
        self.reduce = nn.Linear(hidden_size, inner)
        self.score = nn.Linear(inner, 1)

    def reset_parameters(self) -> None:
        """Xavier weights and a last bias of 35, so that fine-tuning starts with every token kept."""
        nn.init.xavier_uniform_(self.reduce.weight)
        nn.init.zeros_(self.reduce.bias)
        nn.init.xavier_uniform_(self.score.weight)
        nn.init.constant_(self.score.bias, TOKEN_BIAS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) residual stream -> (B, N) fp32 logits."""
        return fp32_linear(self.score, F.relu(fp32_linear(self.reduce, tokens))).squeeze(-1)
