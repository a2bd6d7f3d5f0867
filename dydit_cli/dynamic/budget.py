"""A budget as an input of the routers: one set of weights that serves a range of ratios, chosen when sampling [ours].

Width routers read E_t plus a learned embedding of the budget; token routers get a learned shift of their logits, a number a block.
Both are zero at the start, so that a model to which budgets are given computes what it did. Neither depends on the image or the
timestep, so that widths are as known before sampling as without budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.routers import fp32_linear
from dydit_cli.errors import DyditError

FEATURES = 8
KNOTS = 9
CLOSE = 0.02
"""How far a realised ratio may be from its budget."""


class BudgetRouter(nn.Module):
    """Linear(8, C + L) on cosines of the budget.

    What a model realises at an input is never quite that input. ``ratios`` holds what it realised at evenly spaced ones, measured
    at the end of training, and a budget is looked up there, so that it is met.

    Args:
        low: Least budget.
        high: Largest.
        hidden_size: C.
        depth: L.

    Attributes:
        ratios: (9,) ascending; realised at inputs spaced evenly from ``low`` to ``high``.
        chosen: The budget that was chosen last; not stored.
    """

    ratios: Tensor
    chosen: Tensor

    def __init__(self, low: float, high: float, hidden_size: int, depth: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.sizes = (hidden_size, depth)
        self.linear = nn.Linear(FEATURES, hidden_size + depth)
        self.register_buffer("ratios", torch.linspace(low, high, KNOTS))
        # Whoever keeps what the routers said watches tensors: writing here tells them that it holds no longer.
        self.register_buffer("chosen", torch.tensor(float("nan")), persistent=False)

    def reset_parameters(self) -> None:
        """Zero: the budget says nothing yet."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.ratios = torch.linspace(self.low, self.high, KNOTS)

    def shift(self, amount: float) -> None:
        """See `shift_routers`: the routers' own biases take it."""

    def inputs(self) -> list[float]:
        """Those to which ``ratios`` belong."""
        return [self.low + (self.high - self.low) * index / (KNOTS - 1) for index in range(KNOTS)]

    def input_for(self, budget: float) -> float:
        """The input at which ``budget`` is realised; the nearest one if none does."""
        ratios, inputs = self.ratios.tolist(), self.inputs()
        if budget <= ratios[0]:
            return inputs[0]
        for index in range(1, KNOTS):
            if budget <= ratios[index]:
                step = ratios[index] - ratios[index - 1]
                share = (budget - ratios[index - 1]) / step if step > 0 else 1.0
                return inputs[index - 1] + share * (inputs[index] - inputs[index - 1])
        return inputs[-1]

    def check_realised(self, budget: float) -> None:
        """See that a budget is met.

        Raises:
            DyditError: If training has not brought the model there.
        """
        least, most = float(self.ratios[0]), float(self.ratios[-1])
        if not least - CLOSE <= budget <= most + CLOSE:
            raise DyditError(
                f"The model does not reach a budget of {budget:g}; it was measured to realise {least:.3f} to {most:.3f}.",
                why=f"It was trained for {self.low:g} to {self.high:g}, but not long enough to serve all of that range.",
                fix="Choose a budget that it realises, or train more steps.",
            )

    def forward(self, value: float) -> tuple[Tensor, Tensor]:
        """An input between ``low`` and ``high`` -> (C,) to add to E_t, and (L,) to add to token logits, in fp32."""
        weight = self.linear.weight
        place = (value - self.low) / (self.high - self.low)
        cosines = torch.tensor([math.cos(math.pi * place * k) for k in range(FEATURES)], device=weight.device)
        embedding, tokens = fp32_linear(self.linear, cosines).split(self.sizes)
        return embedding, tokens


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
