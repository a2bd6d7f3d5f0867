"""A budget as an input of the routers: one set of weights that serves a range of ratios, chosen when sampling [ours].

Three things follow from a budget. All logits move by one number, which is what `keep_bias` does by hand: the ratio grows with it.
The token logits of each block move by another. Width routers read E_t plus an embedding. All three are learned and zero at the
start, so that a model to which budgets are given computes what it did. None depends on the image or the timestep, so that widths
are as known before sampling as without budgets.

Training brings a model near its budgets. What is left is removed where it ends: at evenly spaced budgets the one number is
corrected until the budget is what the model realises.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.routers import fp32_linear
from dydit_cli.errors import DyditError

FEATURES = 8
KNOTS = (*(index / 8 for index in range(8)), 0.97, 1.0)
"""Where corrections are measured, from the least budget (0) to the largest (1). The last step is small, because what switches the
last units on is a number many times larger than any other: along a line from 7/8, 0.935 became 0.976 in the small DiT."""
CLOSE = 0.02
"""How far a realised ratio may be from its budget."""

GAIN_SHARE = 0.25
EMBEDDING_SHARE = 0.1
"""Adam moves a weight by the learning rate a step, whatever its gradient. The weights of a width router are multiplied with E_t,
whose magnitudes add up to some hundreds (427 in the small DiT), the budget's with cosines that add up to a few. So the outputs are
multiplied by a share of that sum (logits; 107 there), and by a tenth of that (the embedding). Without it all logits fell to a middle
before the budgets had learned to tell themselves apart: trained for 0.3 to 1, a model realised 0.56 to 0.78."""


class Told(NamedTuple):
    """What a budget says.

    Attributes:
        embedding: (C,) to be added to E_t where width routers read it.
        tokens: (L,) to be added to the token logits of each block.
        shift: A number to be added to all logits.
    """

    embedding: Tensor
    tokens: Tensor
    shift: Tensor


class BudgetRouter(nn.Module):
    """Linear(8, C + L + 1) on cosines of the budget, and a table of corrections.

    Args:
        low: Least budget.
        high: Largest.
        hidden_size: C.
        depth: L.

    Attributes:
        shifts: (10,) added to all logits at the budgets of ``KNOTS``, linear between them; 0 until measured.
        ratios: (10,) realised at these budgets; 0 until measured.
        gain: What the outputs are multiplied by; see `set_gain`.
        chosen: The budget that was chosen last; not stored.
    """

    shifts: Tensor
    ratios: Tensor
    gain: Tensor
    chosen: Tensor

    def __init__(self, low: float, high: float, hidden_size: int, depth: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.sizes = (hidden_size, depth, 1)
        self.linear = nn.Linear(FEATURES, sum(self.sizes))
        self.register_buffer("shifts", torch.zeros(len(KNOTS)))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("ratios", torch.zeros(len(KNOTS)))
        # Whoever keeps what the routers said watches tensors: writing here tells them that it holds no longer.
        self.register_buffer("chosen", torch.tensor(float("nan")), persistent=False)

    def reset_parameters(self) -> None:
        """Zero: the budget says nothing yet."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.forget_corrections()

    def set_gain(self, time_embeddings: Tensor) -> None:
        """Learn as fast as width routers, which read (S, C) embeddings such as these."""
        self.gain.fill_(GAIN_SHARE * time_embeddings.float().abs().sum(dim=1).mean())

    def forget_corrections(self) -> None:
        """Nothing is known of what budgets realise; so it is while weights train."""
        self.shifts.zero_()
        self.ratios.zero_()

    def shift(self, amount: float) -> None:
        """See `shift_routers`: the routers' own biases take it."""

    def knots(self) -> list[float]:
        """The budgets to which ``shifts`` and ``ratios`` belong."""
        return [self.low + (self.high - self.low) * place for place in KNOTS]

    def check_realised(self, budget: float) -> None:
        """See that a budget is met, as far as that was measured.

        Raises:
            DyditError: If no correction brought the model there.
        """
        if not bool(self.ratios.all()):
            return
        realised = float(self._between_knots(self.ratios, budget))
        if abs(realised - budget) > CLOSE:
            least, most = float(self.ratios.min()), float(self.ratios.max())
            raise DyditError(
                f"The model does not follow a budget of {budget:g}: it was measured to realise {realised:.3f} there.",
                why=f"It was trained for {self.low:g} to {self.high:g}, but serves {least:.3f} to {most:.3f}.",
                fix="Choose a budget that it realises, or train more steps.",
            )

    def _between_knots(self, values: Tensor, budget: float) -> Tensor:
        """(10,) values at the knots -> the value at a budget, linear between them."""
        place = (budget - self.low) / (self.high - self.low)
        below = min(max(bisect_right(KNOTS, place) - 1, 0), len(KNOTS) - 2)
        share = min(max((place - KNOTS[below]) / (KNOTS[below + 1] - KNOTS[below]), 0.0), 1.0)
        return values[below] * (1 - share) + values[below + 1] * share

    def forward(self, budget: float) -> Told:
        """A budget between ``low`` and ``high`` -> what it says, in fp32."""
        weight = self.linear.weight
        place = (budget - self.low) / (self.high - self.low)
        cosines = torch.tensor([math.cos(math.pi * place * k) for k in range(FEATURES)], device=weight.device)
        embedding, tokens, shift = fp32_linear(self.linear, cosines).split(self.sizes)
        correction = self._between_knots(self.shifts, budget).float()
        gain = self.gain.float()
        return Told(EMBEDDING_SHARE * gain * embedding, gain * tokens, gain * shift[0] + correction)


def check_budgets(budgets: Sequence[float]) -> tuple[float, float]:
    """The least and the largest of a range of budgets.

    Raises:
        DyditError: If it is none.
    """
    if len(budgets) == 2 and 0 < budgets[0] < budgets[1] <= 1:
        return float(budgets[0]), float(budgets[1])
    raise DyditError(
        f"{list(budgets)} is no range of budgets.",
        why="It needs a least and a largest ratio, above 0 and at most 1.",
        fix="Give two numbers such as 0.3 and 1.0.",
    )
