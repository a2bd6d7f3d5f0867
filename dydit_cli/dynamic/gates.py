"""Gates turn a router's logits into masks. Which gate is used is the caller's choice and enters the forward as an argument.

* `ThresholdGating`: evaluation, 1[logit > 0], no noise.
* `GumbelGating`: training, a hard Gumbel-sigmoid sample with a straight-through gradient.
* `CompleteGating`: everything on; the complete model is the static model.
* `ImposedGating`: masks from elsewhere (tests of equality, benchmarks, replays).
* `ShiftedTokenGating`: any of these, token logits moved by what a budget says of the block.
* `FrozenWidthGating`: imposed widths, live tokens (an ODE solver keeps the widths of an interval).

Source: DyDiT (arXiv 2410.03456), section 3, and the authors' released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.randomness import generator


class Gating(Protocol):
    """Decides the masks of every block from the routers' fp32 logits. Values are 0/1 in fp32."""

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """(B, R) logits of the heads that have a router row -> (B, R) mask."""
        ...

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """(B, R) logits of the channel groups that have a router row -> (B, R) mask."""
        ...

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """The same for the text stream's own MLP, in blocks that have one."""
        ...

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """(B, N) logits of the tokens -> (B, N) mask."""
        ...


@dataclass(frozen=True)
class ThresholdGating:
    """The decision at evaluation: a unit is on where its logit is above zero.

    Comparing the fp32 logit with 0 rather than its sigmoid with 0.5 matters: in bf16, sigmoid(l) is 0.5 for small positive l.

    Attributes:
        keep_bias: Added to all logits, a dial without training; +inf is the complete model.
    """

    keep_bias: float = 0.0

    def _decide(self, logits: Tensor) -> Tensor:
        return (logits + self.keep_bias > 0).float()

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._decide(logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._decide(logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._decide(logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._decide(logits)


@dataclass(frozen=True)
class CompleteGating:
    """Everything on, whatever the routers say."""

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return torch.ones_like(logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return torch.ones_like(logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return torch.ones_like(logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return torch.ones_like(logits)


@dataclass(frozen=True)
class RoutingNoise:
    """Logistic noise (the difference of two Gumbel draws) for every gate of a batch.

    Drawn before the forward and handed to it, so that gradient checkpointing replays a block with the same noise.

    Attributes:
        heads: (B, L, H). groups: (B, L, G). tokens: (B, L, N).
        context_groups: (B, L, G), for models with a text stream.

    Of a model with ordered width, all heads of a block share one draw, and so do all groups: masks are prefixes in training too.
    """

    heads: Tensor
    groups: Tensor
    tokens: Tensor
    context_groups: Tensor | None = None

    @classmethod
    def draw(
        cls,
        geometry: Geometry,
        seed: int,
        step: int,
        indices: Sequence[int],
        device: torch.device | str | None = None,
    ) -> RoutingNoise:
        """Draw the noise of the samples with the global ``indices`` at ``step``; a function of its arguments alone."""
        units = [geometry.num_heads, geometry.num_groups, geometry.num_tokens]
        units += [geometry.num_groups] * geometry.has_context
        sizes = [geometry.depth * size for size in units]
        rows = [torch.rand(sum(sizes), generator=generator(seed, "gumbel", step, index)) for index in indices]
        # log(u / (1 - u)) has the law of g1 - g2; u is kept off 0 and 1, where it would be infinite.
        uniform = torch.stack(rows).clamp(1e-7, 1 - 1e-7)
        logistic = torch.log(uniform) - torch.log1p(-uniform)
        parts = logistic.to(device=device).split(sizes, dim=1)
        heads, groups, tokens, *context = (part.unflatten(1, (geometry.depth, -1)) for part in parts)
        if geometry.ordered_width:
            heads, groups, *context = (part[:, :, :1].expand_as(part) for part in (heads, groups, *context))
        return cls(heads, groups, tokens, *context)

    def rows(self, rows: slice) -> RoutingNoise:
        """The noise of some samples."""
        context = None if self.context_groups is None else self.context_groups[rows]
        return RoutingNoise(self.heads[rows], self.groups[rows], self.tokens[rows], context)


@dataclass(frozen=True)
class GumbelGating:
    """Gumbel-sigmoid samples: y = sigmoid((logit + g1 - g2) / temperature), hard at 0.5, straight-through gradient.

    The temperature does not change the probability of keeping a unit, sigmoid(logit); it widens the gradient. At the paper's
    starting bias of 15 a temperature of 1 leaves a gradient of 3e-7 and no router ever moves; 5 leaves 9e-3.

    Attributes:
        noise: Of the batch.
        temperature: Of the gradient.
        scale: Of the noise. At 1 a unit is kept with probability sigmoid(logit), the paper's rule; at 0 it is kept where its logit
            is above zero, as at evaluation, with the same straight-through gradient [ours].
        budget: What the routers of a model with budgets are told instead of the model's own.
        shift: Added to all logits; what a budget comes to, see `BudgetRouter`.
    """

    noise: RoutingNoise
    temperature: float = 5.0
    scale: float = 1.0
    budget: float | None = None
    shift: Tensor | float = 0.0

    def _sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        noisy = logits + self.shift + self.scale * noise.to(logits.device)
        soft = torch.sigmoid(noisy / self.temperature)
        hard = (noisy > 0).float()
        # Written so that the value is exactly 0 or 1: (hard - soft) + soft would be off by rounding.
        return hard + (soft - soft.detach())

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`. The noise of an always-on head (no router row) is not used."""
        return self._sample(logits, self.noise.heads[:, block, -logits.shape[1] :])

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._sample(logits, self.noise.groups[:, block, -logits.shape[1] :])

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        if self.noise.context_groups is None:
            raise TypeError("the noise was drawn for a model without a text stream")
        return self._sample(logits, self.noise.context_groups[:, block, -logits.shape[1] :])

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._sample(logits, self.noise.tokens[:, block])


@dataclass(frozen=True)
class ImposedGating:
    """Masks from elsewhere, always-on units included; the routers' logits are ignored."""

    routing: Routing

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.routing.blocks[block].heads.to(logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.routing.blocks[block].groups.to(logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`. Masks without any for the text's MLP leave it complete."""
        mask = self.routing.blocks[block].context_groups
        return torch.ones_like(logits) if mask is None else mask.to(logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.routing.blocks[block].tokens.to(logits)


@dataclass(frozen=True)
class FrozenWidthGating:
    """Widths from elsewhere, tokens decided live by ``live``.

    An adaptive ODE solver evaluates the field inside an interval at points that nobody knows before; with widths that change
    there the field would be discontinuous and the error control would shrink its steps without end.
    """

    widths: Routing
    live: Gating

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.widths.blocks[block].heads.to(logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.widths.blocks[block].groups.to(logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`. Masks without any for the text's MLP leave it complete."""
        mask = self.widths.blocks[block].context_groups
        return torch.ones_like(logits) if mask is None else mask.to(logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.tokens(block, logits)


@dataclass(frozen=True)
class ShiftedTokenGating:
    """Decides as ``live`` does, the tokens of block l from logits moved by ``shifts[l]``.

    Attributes:
        live: Decides.
        shifts: (L,).
    """

    live: Gating
    shifts: Tensor

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.heads(block, logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.groups(block, logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.context_groups(block, logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self.live.tokens(block, logits + self.shifts[block])
