"""The routers of a dynamic block. They give fp32 logits; gates (`dynamic/gates.py`) make masks of them.

Width (TDW): `HeadRouter` and `ChannelRouter` read the timestep embedding alone, so the widths of a whole schedule are known
before sampling. Their ordered forms decide how many units are on, not which: `width_routers` chooses. Tokens (SDT):
`TokenRouter` reads the residual stream after the attention residual.

Source: DyDiT (arXiv 2410.03456), section 3; starting values as in the authors' released code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.errors import DyditError, did_you_mean

WIDTH_BIAS = 15.0
TOKEN_BIAS = 35.0
UNIT_GAP_BIAS = math.log(math.e - 1)
"""Where softplus is 1."""


def fp32_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Apply ``layer`` in fp32 whatever its dtype and whatever autocast says: a decision must not depend on rounding."""
    if not torch.is_autocast_enabled(inputs.device.type):
        # Entering and leaving a context takes as long as the product of a small model.
        return F.linear(inputs.float(), in_fp32(layer.weight, inputs), in_fp32(layer.bias, inputs))
    with torch.autocast(device_type=inputs.device.type, enabled=False):
        return F.linear(inputs.float(), in_fp32(layer.weight, inputs), in_fp32(layer.bias, inputs))


def in_fp32(parameter: Tensor, beside: Tensor) -> Tensor:
    """A parameter in fp32 where ``beside`` is: offloading fetches a layer's weights when it is called, and here none is."""
    return parameter.to(device=beside.device, dtype=torch.float32)


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
        self.linear = nn.Linear(hidden_size, self.rows(units, always_on))

    @staticmethod
    def rows(units: int, always_on: bool) -> int:
        """Rows of the linear layer."""
        return units - int(always_on)

    @classmethod
    def macs(cls, hidden_size: int, units: int, always_on: bool) -> float:
        """Multiply-accumulates of one timestep embedding."""
        return float(hidden_size * cls.rows(units, always_on))

    def reset_parameters(self) -> None:
        """Xavier weights and a bias of 15, so that fine-tuning starts from the complete model."""
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.constant_(self.linear.bias, WIDTH_BIAS)

    def shift(self, amount: float) -> None:
        """Add ``amount`` to all logits."""
        self.linear.bias.add_(amount)

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


class OrderedWidthRouter(WidthRouter):
    """How many units are on, by their rank: logits descend, so that with the same noise for all units a mask is a prefix [ours].

    l_k = a - sum over j <= k of softplus(b_j), with (a, b_1 ... b_R) = Linear(C, R + 1) of the timestep embedding. The expected
    number of routed units is the sum over k of sigmoid(l_k).
    """

    @staticmethod
    def rows(units: int, always_on: bool) -> int:
        """See `WidthRouter`: one for a, one for each b."""
        return units - int(always_on) + 1

    def reset_parameters(self) -> None:
        """Weights of zero, and biases at which units lie a logit apart and the last of them at 15, as a free one does.

        Not xavier: a row that varies with t adds to the gaps of all units behind it, which would leave the start to chance.
        """
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, UNIT_GAP_BIAS)
        with torch.no_grad():
            self.linear.bias[0] = WIDTH_BIAS + len(self.linear.bias) - 1

    def shift(self, amount: float) -> None:
        """See `WidthRouter`."""
        self.linear.bias[0].add_(amount)

    def forward(self, time_embedding: Tensor) -> Tensor:
        """See `WidthRouter`."""
        values = super().forward(time_embedding)
        return values[:, :1] - F.softplus(values[:, 1:]).cumsum(dim=1)


class OrderedHeadRouter(OrderedWidthRouter, HeadRouter):
    """Ordered width over attention heads."""


class OrderedChannelRouter(OrderedWidthRouter, ChannelRouter):
    """Ordered width over the channel groups of the MLP."""


WIDTHS: dict[str, tuple[type[HeadRouter], type[ChannelRouter]]] = {
    "free": (HeadRouter, ChannelRouter),
    "ordered": (OrderedHeadRouter, OrderedChannelRouter),
}
"""Classes for heads and groups by name: any set of units (the paper's), or the most important ones; a plug-in adds its own."""


def width_routers(width: str) -> tuple[type[HeadRouter], type[ChannelRouter]]:
    """The classes for heads and groups of a kind of width.

    Raises:
        DyditError: For a name that nobody registered.
    """
    if width in WIDTHS:
        return WIDTHS[width]
    raise DyditError(
        f"There is no width called '{width}'.",
        why=f"It is one of {', '.join(WIDTHS)}, or of a plug-in that is not loaded.",
        fix=did_you_mean(width, WIDTHS) or "Pass one of these, or the file that it comes from with --plugin.",
    )


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

    def shift(self, amount: float) -> None:
        """Add ``amount`` to all logits."""
        self.score.bias.add_(amount)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) residual stream -> (B, N) fp32 logits."""
        return fp32_linear(self.score, F.relu(fp32_linear(self.reduce, tokens))).squeeze(-1)


@torch.no_grad()
def shift_routers(model: nn.Module, amount: float) -> None:
    """Add ``amount`` to the logits of all routers of a model, in their biases: a dial that is stored.

    Routers are the modules whose name ends in ``_router``.
    """
    for name, module in model.named_modules():
        if name.endswith("_router"):
            module.shift(amount)


@torch.no_grad()
def keep_everything(model: nn.Module) -> None:
    """Have all routers keep everything, whatever they are shown.

    For training without them: their start has weights beside a large bias, and a timestep embedding that trains on for thousands
    of steps outgrows that bias.
    """
    for name, module in model.named_modules():
        if name.endswith("_router"):
            module.reset_parameters()
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.zero_()
