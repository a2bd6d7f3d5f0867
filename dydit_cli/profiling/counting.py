"""Count the multiply-accumulates of the graph that really runs, with two public counters, and hold the formula against them.

fvcore counts operations of the traced graph, 4 an element for LayerNorm. torch's counter counts floating-point operations, two a
multiply-accumulate, and has no entry for LayerNorm. Neither counts element-wise work. Both see gathered tokens and sliced weights
as they are, so that the compact graph costs what it executes: its width routers (Linear(C, H - 1) and Linear(C, G - 1) on one
timestep embedding) and its token routers (Linear(C, C/16) and Linear(C/16, 1) on every token) included. The formula counts those
routers too, as `MacsReport.routers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dydit_cli.dynamic.gates import CompleteGating, Gating, ImposedGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.dynamic.timed import is_timed
from dydit_cli.execution import CompactExecutor, Executor, StaticExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import macs_of

AGREEMENT = 1e-3


@dataclass(frozen=True)
class CountedMacs:
    """The same pass counted three ways, in MACs an image.

    Attributes:
        formula: With LayerNorm.
        fvcore: With LayerNorm.
        formula_without_layernorm: For comparison with torch.
        torch: Half of what torch's counter gives.
        timed: Whether the model's weights follow the timestep (TD-LoRA), which the formula leaves out.
    """

    formula: float
    fvcore: float
    formula_without_layernorm: float
    torch: float
    timed: bool = False

    @property
    def agrees(self) -> bool:
        """Whether each counter is within 0.1 % of the formula of its convention."""
        return self.deviation <= AGREEMENT

    @property
    def deviation(self) -> float:
        """The larger of the two relative deviations."""
        return max(
            abs(self.fvcore / self.formula - 1),
            abs(self.torch / self.formula_without_layernorm - 1),
        )


class WitnessedGating:
    """Another gating, and a list of the logits that it was shown.

    Compact execution reads decisions on the host, and imposed masks do not even depend on the logits: in a traced graph nothing uses
    the routers then, and the tracer drops them. A forward that returns the logits keeps them.
    """

    def __init__(self, gating: Gating) -> None:
        self.gating = gating
        self.logits: list[Tensor] = []

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        self.logits.append(logits)
        return self.gating.heads(block, logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        self.logits.append(logits)
        return self.gating.groups(block, logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        self.logits.append(logits)
        return self.gating.context_groups(block, logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        self.logits.append(logits)
        return self.gating.tokens(block, logits)


class ImposedForward(nn.Module):
    """A model's forward with an executor and a gating bound, for tools that call a module with positional tensors only.

    Args:
        model: The model; its own execution is not changed.
        executor: How masks become arithmetic.
        gating: How logits become masks; `ImposedGating` runs a given routing.
    """

    def __init__(self, model: DynamicModel, executor: Executor, gating: Gating) -> None:
        super().__init__()
        self.model = model
        self.executor = executor
        self.gating = gating

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Any) -> tuple[Tensor, ...]:
        """(B, *sample_shape), (B,), conditions -> the prediction, and the logits of every router that ran."""
        gating = WitnessedGating(self.gating)
        prediction, _ = self.model.denoise(
            hidden_states, timestep, condition, executor=self.executor, gating=gating
        )
        return prediction, *gating.logits


class ConditionedForward(nn.Module):
    """A forward with its condition bound, for a tracer that takes tensors alone: prompts are none."""

    def __init__(self, forward: nn.Module, condition: Any) -> None:
        super().__init__()
        self.bound = forward
        self.condition = condition

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        """See `ImposedForward`."""
        outputs: tuple[Tensor, ...] = self.bound(hidden_states, timestep, self.condition)
        return outputs


def count_static(model: DynamicModel, hidden_states: Tensor, timestep: Tensor, condition: Any) -> CountedMacs:
    """Count the complete model without routers.

    Args:
        model: In eval mode.
        hidden_states: (B, *sample_shape).
        timestep: (B,).
        condition: Of the B samples.
    """
    forward = ImposedForward(model, StaticExecutor(), CompleteGating())
    return _count(forward, (hidden_states, timestep, condition), None)


def count_compact(
    model: DynamicModel, routing: Routing, hidden_states: Tensor, timestep: Tensor, condition: Any
) -> CountedMacs:
    """Count compact execution of ``routing``, routers included.

    Args:
        model: In eval mode.
        routing: Masks of the B samples, as `model.denoise` or `model.routing` gives them.
        hidden_states: (B, *sample_shape).
        timestep: (B,).
        condition: Of the B samples.
    """
    forward = ImposedForward(model, CompactExecutor(), ImposedGating(routing))
    return _count(forward, (hidden_states, timestep, condition), routing)


@torch.no_grad()
def _count(
    forward: ImposedForward, inputs: tuple[Tensor, Tensor, Any], routing: Routing | None
) -> CountedMacs:
    batch = len(inputs[0])
    report = macs_of(forward.model.geometry, routing)
    # A first pass packs weights, which is no part of the graph.
    forward(*inputs)
    return CountedMacs(
        formula=report.total,
        fvcore=_fvcore_macs(forward, inputs) / batch,
        formula_without_layernorm=report.total_without_layernorm,
        torch=_torch_macs(forward, inputs) / batch,
        timed=is_timed(forward.model),
    )


def _fvcore_macs(forward: nn.Module, inputs: tuple[Tensor, Tensor, Any]) -> float:
    from fvcore.nn import FlopCountAnalysis

    *tensors, condition = inputs
    analysis = FlopCountAnalysis(ConditionedForward(forward, condition), tuple(tensors))
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_handle)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return float(analysis.total())


def attention_handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """MACs of scaled_dot_product_attention for fvcore, which has no entry for it: b * q * k * d + b * q * k * d_v.

    Args:
        inputs: Graph values of query (..., q, d), key (..., k, d), value (..., k, d_v) and the options.
        outputs: Not used.
    """
    query, key, value = (entry.type().sizes() for entry in inputs[:3])
    pairs = prod(query[:-1]) * key[-2]
    return int(pairs * query[-1] + pairs * value[-1])


def _torch_macs(forward: nn.Module, inputs: tuple[Tensor, Tensor, Any]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    # The fused CPU kernel is not in the counter's table; the mathematical one is made of products that are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(*inputs)
    return counter.get_total_flops() / 2
