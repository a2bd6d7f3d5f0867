"""The routers: small layers that decide which heads, channel groups and image tokens of a block are computed.

Heads and groups depend on the timestep alone, so that a whole step's widths are decided at once, before its first block. Image tokens
are decided by each block from the tokens, the text and the conditioning. A unit is on where its fp32 logit is above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .problems import NodeError

RMS_EPS = 1e-6
LAYER_NORM_EPS = 1e-5
ROUTER, ORDERED = "router", "ordered_router"
"""A row a unit; or a row a step between two units, so that the most important ones are on."""
WIDTHS = {True: ("attn_rate", "mlp_rate", "txt_mlp_rate"), False: ("attn_rate", "mlp_rate")}
"""Of blocks of two streams and of one: heads, groups, groups of the text's MLP."""
ORDERS = {
    "attn_rate": "attn.head_order",
    "mlp_rate": "mlp.channel_order",
    "txt_mlp_rate": "txt_mlp.channel_order",
}


@dataclass(frozen=True)
class Shape:
    """Of the model that the routers are for.

    Attributes:
        hidden: C. heads: H. mlp: Hidden channels of an MLP. double: Blocks of two streams. single: Blocks of one.
    """

    hidden: int
    heads: int
    mlp: int
    double: int
    single: int


@dataclass(frozen=True)
class Width:
    """What of a block is computed; None means all.

    Attributes:
        heads: Indices of the heads.
        channels: Of the image's MLP, or of the only one.
        text_channels: Of the text's.
    """

    heads: Tensor | None = None
    channels: Tensor | None = None
    text_channels: Tensor | None = None


Parts = list[tuple[Tensor | None, Width]]
"""Samples of a batch with one width (None for the whole batch), and that width."""


class BlockRouters:
    """The routers and orders of one block.

    Args:
        tensors: By name without the block's prefix.
        shape: Of the model.
        double: Whether the block has two streams.
    """

    def __init__(self, tensors: dict[str, Tensor], shape: Shape, *, double: bool) -> None:
        self.tensors = tensors
        self.shape = shape
        self.double = double

    @property
    def kind(self) -> str | None:
        """`ROUTER`, `ORDERED`, or None without width routers."""
        return next((kind for kind in (ROUTER, ORDERED) if f"attn_rate.{kind}.weight" in self.tensors), None)

    @property
    def is_low_rank(self) -> bool:
        """Whether the token router is the small one; else it is that of the authors of DyDiT++."""
        return "token_selection.reduce.weight" in self.tensors

    def check(self, name: str, like: BlockRouters) -> None:
        """See that nothing is missing.

        Raises:
            NodeError: If something is.
        """
        layers = ("reduce", "text", "time", "score") if like.is_low_rank else ("linear_t", "norm", "router")
        needed = [f"token_selection.{layer}" for layer in layers]
        needed += [f"{rate}.{like.kind}" for rate in WIDTHS[self.double] if like.kind is not None]
        missing = [
            f"{layer}.{part}"
            for layer in needed
            for part in ("weight", "bias")
            if f"{layer}.{part}" not in self.tensors
        ]
        if missing:
            raise NodeError(
                f"The routers of {name} are not complete.",
                why=f"There is no {', '.join(missing[:3])}.",
                fix="Export the model again, or copy the file again.",
            )

    # ------------------------------------------------------------------ width

    def masks(self, time_embedding: Tensor, keep_bias: float) -> list[Tensor]:
        """(B, C) embedding of the timestep -> for each of `WIDTHS` a (B, units) bool mask by rank; none without width routers."""
        kind = self.kind
        if kind is None:
            return []
        rows = len(self.tensors[f"attn_rate.{kind}.bias"])
        always_on = rows - int(kind == ORDERED) == self.shape.heads - 1
        return [
            self._mask(f"{rate}.{kind}", time_embedding, keep_bias, always_on) for rate in WIDTHS[self.double]
        ]

    def _mask(self, name: str, time_embedding: Tensor, keep_bias: float, always_on: bool) -> Tensor:
        logits = self._linear(name, time_embedding)
        if name.endswith(ORDERED):
            logits = logits[:, :1] - F.softplus(logits[:, 1:]).cumsum(dim=1)
        mask = logits + keep_bias > 0
        return torch.cat([mask.new_ones(len(mask), 1), mask], dim=1) if always_on else mask

    def width(self, masks: Sequence[Sequence[bool]]) -> Width:
        """The indices that one sample's masks stand for."""
        return Width(
            *(self._units(rate, mask) for rate, mask in zip(WIDTHS[self.double], masks, strict=False))
        )

    def _units(self, rate: str, mask: Sequence[bool]) -> Tensor | None:
        """Stored heads or channels of the ranks that are on, ascending."""
        if all(mask):
            return None
        anything = self.tensors["token_selection." + ("score.bias" if self.is_low_rank else "router.bias")]
        count = self.shape.heads if rate == "attn_rate" else self.shape.mlp
        order = self.tensors.get(ORDERS[rate])
        ranks = torch.tensor(
            [rank for rank, on in enumerate(mask) if on], dtype=torch.long, device=anything.device
        )
        size = count // len(mask)
        places = (ranks[:, None] * size + torch.arange(size, device=ranks.device)).flatten()
        return (places if order is None else order[places]).sort().values

    # ------------------------------------------------------------------ tokens

    def keep(self, image: Tensor, text: Tensor, conditioning: Tensor, keep_bias: float) -> Tensor:
        """(B, N, C) image tokens, (B, T, C) text tokens, (B, C) conditioning -> (B, N) bool, False for those that are skipped."""
        logits = (self._low_rank if self.is_low_rank else self._full)(image, text, conditioning)
        return logits + keep_bias > 0

    def _low_rank(self, image: Tensor, text: Tensor, conditioning: Tensor) -> Tensor:
        """silu((1 + a) * W RMS(x) + b + V mean RMS(y)), scored, with (a, b) = U silu(c)."""
        name = "token_selection"
        modulation = self._linear(f"{name}.time", F.silu(conditioning.float()))[:, None]
        scale, shift = modulation.chunk(2, dim=2)
        prompt = self._linear(f"{name}.text", _rms(text).mean(dim=1, keepdim=True))
        hidden = F.silu(self._linear(f"{name}.reduce", _rms(image)) * (1 + scale) + shift + prompt)
        return self._linear(f"{name}.score", hidden).squeeze(-1)

    def _full(self, image: Tensor, text: Tensor, conditioning: Tensor) -> Tensor:
        """Normalised and modulated tokens plus the mean of the text's, scored."""
        name = "token_selection"
        modulation = self._linear(f"{name}.linear_t", F.silu(conditioning.float()))[:, None]
        shift, scale, text_shift, text_scale = modulation.chunk(4, dim=2)
        prompt = (self._normed(text) * (1 + text_scale) + text_shift).mean(dim=1, keepdim=True)
        return self._linear(f"{name}.router", self._normed(image) * (1 + scale) + shift + prompt).squeeze(-1)

    def _normed(self, tokens: Tensor) -> Tensor:
        weight, bias = (self.tensors[f"token_selection.norm.{part}"].float() for part in ("weight", "bias"))
        return F.layer_norm(tokens.float(), weight.shape, weight, bias, LAYER_NORM_EPS)

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        """In fp32, whatever the model computes in: a decision must not hang on rounding."""
        weight, bias = (self.tensors[f"{name}.{part}"].float() for part in ("weight", "bias"))
        return F.linear(inputs.float(), weight, bias)

    def to(self, device: torch.device) -> BlockRouters:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return BlockRouters(moved, self.shape, double=self.double)


@dataclass(frozen=True)
class Routers:
    """All routers of a model.

    Attributes:
        shape: Of the model.
        blocks: Those of two streams, then those of one.
    """

    shape: Shape
    blocks: tuple[BlockRouters, ...]
    _moved: dict[torch.device, Routers] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> Routers:
        """The same on a device, where they then stay."""
        if device not in self._moved:
            self._moved[device] = Routers(self.shape, tuple(block.to(device) for block in self.blocks))
        return self._moved[device]

    def widths(self, time_embedding: Tensor, keep_bias: float) -> list[Parts]:
        """Of each block, the widths of a batch's samples; one transfer to the host for all of them.

        Args:
            time_embedding: (B, C), of the timestep alone.
            keep_bias: Added to all logits.
        """
        masks = [block.masks(time_embedding, keep_bias) for block in self.blocks]
        flat = [mask for of_block in masks for mask in of_block]
        if not flat:
            return [[(None, Width())] for _ in self.blocks]
        values = torch.cat(flat, dim=1).tolist()
        found, start = [], 0
        for block, of_block in zip(self.blocks, masks, strict=True):
            sizes = [mask.shape[1] for mask in of_block]
            samples = [_cut(row, start, sizes) for row in values]
            found.append(_parts(block, samples, time_embedding.device))
            start += sum(sizes)
        return found


def _cut(row: Sequence[bool], start: int, sizes: Sequence[int]) -> tuple[tuple[bool, ...], ...]:
    """Consecutive pieces of a row."""
    pieces = []
    for size in sizes:
        pieces.append(tuple(row[start : start + size]))
        start += size
    return tuple(pieces)


def _parts(
    block: BlockRouters, samples: Sequence[tuple[tuple[bool, ...], ...]], device: torch.device
) -> Parts:
    """A batch by width. Samplers give all samples one timestep, so that there is one part as a rule."""
    by_masks: dict[tuple[tuple[bool, ...], ...], list[int]] = {}
    for sample, masks in enumerate(samples):
        by_masks.setdefault(masks, []).append(sample)
    if len(by_masks) == 1:
        return [(None, block.width(samples[0]))]
    return [(torch.tensor(rows, device=device), block.width(masks)) for masks, rows in by_masks.items()]


def _rms(tokens: Tensor) -> Tensor:
    """Tokens over their root mean square, in fp32."""
    values = tokens.float()
    return values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + RMS_EPS)
