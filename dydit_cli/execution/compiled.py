"""Compiled execution: a whole block as one graph of `torch.compile`, in compact and in static execution.

A block becomes a pure function of tensors. The weights of its active units are inputs, so that one graph serves every block,
width and timestep; so is what decides the tokens, so that it serves every gating with a threshold. Sizes that change from step
to step (active units, kept tokens) are dynamic from the first call on: no recompilation when they change. A new batch size or
number type is compiled for once; the second batch size makes that size dynamic too.

What a graph cannot take runs eagerly, with the same result: batches of mixed widths, blocks without any active head or group,
autocast, and forwards whose gradient is wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.dynamic.gates import (
    CompleteGating,
    FrozenWidthGating,
    Gating,
    ImposedGating,
    ShiftedTokenGating,
    ThresholdGating,
)
from dydit_cli.dynamic.layers import Sequences
from dydit_cli.errors import DyditError
from dydit_cli.execution.compact import CompactExecutor
from dydit_cli.execution.interface import BlockWidth, BranchModulation, DynamicBlock, modulate
from dydit_cli.execution.plan import CompactWidth
from dydit_cli.execution.quantised import plain
from dydit_cli.execution.slices import Slice
from dydit_cli.execution.static import StaticExecutor

Backend = str | Callable[..., Any]
"""What `torch.compile` calls so; a name such as ``inductor`` or a function."""

GELU_SLOPE = 1.5957691216057308
"""2 * sqrt(2 / pi)."""

_numbers = itertools.count()


class BlockCompiler:
    """An executor that can run a block of DiT's form at once: attention and MLP, each behind a LayerNorm and three modulations."""

    def run_block(
        self,
        block: DynamicBlock,
        tokens: Tensor,
        modulation: BranchModulation,
        width: BlockWidth,
        gating: Gating,
        index: int,
    ) -> tuple[Tensor, Tensor] | None:
        """(B, N, C) tokens -> tokens and the (B, N) mask of those that entered the MLP, or None: run it in parts."""
        raise NotImplementedError


# ------------------------------------------------------------------ the functions that are compiled


def plus_bias(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(R, K) @ (K, M) + (M,), the sum left to whatever kernel comes next.

    addmm on a CPU writes the bias over the whole output first. The third axis keeps the compiler from making an addmm of it.
    """
    product = rows @ weight
    return (product[None] + bias)[0]


def gelu_by_sigmoid(inputs: Tensor) -> Tensor:
    """GELU's tanh form, written x * sigmoid(2u): the same function, and a compiled sigmoid takes half the time of a tanh."""
    exact = inputs.float()
    return (exact * torch.sigmoid(GELU_SLOPE * (exact + 0.044715 * exact * exact * exact))).to(inputs.dtype)


def compact_block(
    tokens: Tensor,
    modulations: Tensor,
    attention: tuple[Tensor, ...],
    mlp: tuple[Tensor, ...],
    router: tuple[Tensor, ...],
    offsets: Tensor,
    head_dim: int,
    eps: tuple[float, float],
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """A block over its active units and kept tokens.

    Args:
        tokens: (B, N, C).
        modulations: (B, 6C): shift, scale and gate of attention, then of the MLP.
        attention: `Slice` with its units apart: (k, 3 * C_h, C), (k, 3 * C_h), (k, C_h, C), (C,). A count of heads that torch
            had to find by dividing rows would be guarded in ways that compile again.
        mlp: `Slice`: (k * width, C), (k * width,), (k * width, C), (C,).
        router: Weight and bias of the token router's two layers.
        offsets: (B, N) fp32, added to the token logits; +-inf imposes a decision.
        head_dim: C_h.
        eps: Of the LayerNorm before attention, and of the one before the MLP.
        sequences: Which tokens attend to each other; a graph for each kind.

    Returns:
        (B, N, C) tokens and the (B, N) fp32 mask of those that entered the MLP.
    """
    batch, length, channels = tokens.shape
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulations.chunk(6, dim=1)
    entry, entry_bias, leave, leave_bias = attention
    inputs = modulate(F.layer_norm(tokens, (channels,), eps=eps[0]), shift[:, None], scale[:, None])
    heads = entry.shape[0]
    qkv = F.linear(inputs, entry.flatten(0, 1), entry_bias.flatten()).view(batch, length, heads, 3, head_dim)
    query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)
    mixed = sequences.attend(query, key, value).transpose(1, 2)
    attended = plus_bias(mixed.reshape(batch * length, heads * head_dim), leave.flatten(0, 1), leave_bias)
    flat = (tokens + gate[:, None] * attended.view(batch, length, channels)).flatten(0, 1)

    reduce_weight, reduce_bias, score_weight, score_bias = (part.float() for part in router)
    hidden = F.relu(F.linear(flat.float(), reduce_weight, reduce_bias))
    logits = F.linear(hidden, score_weight, score_bias).view(batch, length)
    keep = logits + offsets > 0

    index = keep.flatten().nonzero().squeeze(1)
    sample = index // length
    before = flat.index_select(0, index)
    rows = modulate(
        F.layer_norm(before, (channels,), eps=eps[1]),
        mlp_shift.index_select(0, sample),
        mlp_scale.index_select(0, sample),
    )
    entry, entry_bias, leave, leave_bias = mlp
    update = plus_bias(gelu_by_sigmoid(plus_bias(rows, entry.t(), entry_bias)), leave, leave_bias)
    after = before + mlp_gate.index_select(0, sample) * update
    # Every index occurs once: a copy does it, where a sum would take atomic additions.
    return flat.index_copy(0, index, after).view(batch, length, channels), keep.float()


def static_block(
    tokens: Tensor,
    modulations: Tensor,
    weights: tuple[Tensor, ...],
    num_heads: int,
    eps: tuple[float, float],
    sequences: Sequences,
) -> Tensor:
    """The complete block in the original's arithmetic.

    Args:
        tokens: (B, N, C).
        modulations: (B, 6C).
        weights: Weight and bias of qkv, output projection, fc1 and fc2.
        num_heads: H.
        eps: Of the LayerNorm before attention, and of the one before the MLP.
        sequences: Which tokens attend to each other.
    """
    batch, length, channels = tokens.shape
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulations.chunk(6, dim=1)
    qkv_weight, qkv_bias, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    inputs = modulate(F.layer_norm(tokens, (channels,), eps=eps[0]), shift[:, None], scale[:, None])
    qkv = F.linear(inputs, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = sequences.attend(query, key, value).transpose(1, 2)
    tokens = tokens + gate[:, None] * F.linear(mixed.flatten(2), proj_weight, proj_bias)
    inputs = modulate(F.layer_norm(tokens, (channels,), eps=eps[1]), mlp_shift[:, None], mlp_scale[:, None])
    hidden = F.gelu(F.linear(inputs, fc1_weight, fc1_bias), approximate="tanh")
    return tokens + mlp_gate[:, None] * F.linear(hidden, fc2_weight, fc2_bias)


# ------------------------------------------------------------------ compiling and calling them


class GraphBySequences:
    """A function compiled for itself for each way in which tokens attend to each other: what torch learns of sizes under one, and
    the graphs that it counts, are not those of another.

    Args:
        function: See `FullGraph`.
        backend: Of `torch.compile`.
    """

    def __init__(self, function: Callable[..., Any], backend: Backend) -> None:
        self._function = function
        self._backend = backend
        self._graphs: dict[Sequences, FullGraph] = {}

    def __call__(self, *arguments: object, sequences: Sequences) -> Any:
        """Call it with ``sequences`` as its last argument; see `FullGraph`."""
        graph = self._graphs.get(sequences)
        if graph is None:
            # Of two threads that come here at once, one compiles for nothing.
            graph = self._graphs.setdefault(sequences, FullGraph(self._function, self._backend))
        return graph(*arguments, sequences)


class FullGraph:
    """A function compiled as one graph; settings of torch are changed for the length of a call and of its thread alone.

    Args:
        function: Pure, of tensors, tuples of tensors and numbers.
        backend: Of `torch.compile`.
    """

    def __init__(self, function: Callable[..., Any], backend: Backend) -> None:
        # torch keeps graphs, their limit and what it has learned of sizes by code object and name. A copy under a name of its
        # own keeps apart what belongs to two models, and goes with its executor.
        if not isinstance(function, FunctionType):
            raise TypeError("a plain function is needed")
        name = f"{function.__name__}_{next(_numbers)}"
        copied = FunctionType(
            function.__code__.replace(co_name=name, co_qualname=name), function.__globals__, name
        )
        self._compiled = torch.compile(copied, backend=backend, fullgraph=True)

    def __call__(self, *arguments: object) -> Any:
        """Call it; None if torch has compiled for so many shapes already that it refuses another.

        Raises:
            DyditError: If it cannot be compiled here.
        """
        errors = torch._dynamo.exc
        try:
            # Without this setting the number of kept tokens would break the graph. torch keeps it for this thread alone.
            with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
                return self._compiled(*arguments)
        except errors.FailOnRecompileLimitHit:
            return None
        except errors.TorchDynamoException as error:
            raise DyditError(
                "torch.compile cannot compile the model's blocks on this machine.",
                why=first_line(getattr(error, "inner_exception", error)),
                fix="Install a C++ compiler (g++ or clang) if there is none, or leave compile out.",
            ) from error


def first_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next((line for line in lines if line), 'no message')[:300]}"


def changing(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors alone, with the first size of each marked as one that changes from call to call.

    As views they would bring what they are views of, whose sizes torch would guard too: `.data` forgets it.
    """
    alone = tuple(tensor.data for tensor in tensors)
    for tensor in alone:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return alone


def attention_inputs(part: Slice) -> tuple[Tensor, ...]:
    """The weights of the active heads, as `compact_block` takes them."""
    apart = (tensor.unflatten(0, (part.units, -1)) for tensor in (part.entry, part.entry_bias, part.leave))
    return *changing(*apart), part.leave_bias.data


def mlp_inputs(part: Slice) -> tuple[Tensor, ...]:
    """The weights of the active groups, as `compact_block` takes them."""
    return *changing(part.entry, part.entry_bias, part.leave), part.leave_bias.data


def side_by_side(modulation: BranchModulation) -> Tensor:
    """(B, 6C): one fresh tensor, so that its strides are the same wherever the values come from."""
    return torch.cat([values for of in modulation for values in (of.shift, of.scale, of.gate)], dim=1)


def token_offsets(gating: Gating, index: int, tokens: Tensor) -> Tensor | None:
    """(B, N) fp32: what a gating adds to the token logits of block ``index`` before their sign decides; None if it does more."""
    while isinstance(gating, FrozenWidthGating):
        gating = gating.live
    if type(gating) is ShiftedTokenGating:
        unmoved = token_offsets(gating.live, index, tokens)
        return None if unmoved is None else unmoved + gating.shifts[index]
    shape, infinity = tokens.shape[:2], float("inf")
    # Exact types: a subclass may decide otherwise.
    if type(gating) is ThresholdGating:
        return torch.full(shape, gating.keep_bias, device=tokens.device)
    if type(gating) is CompleteGating:
        return torch.full(shape, infinity, device=tokens.device)
    if type(gating) is ImposedGating:
        kept = gating.routing.blocks[index].tokens.to(tokens.device) > 0
        return torch.full(shape, -infinity, device=tokens.device).masked_fill_(kept, infinity)
    return None


def runs_in_a_graph(*tensors: Tensor) -> bool:
    """Whether a call may leave gradients and autocast out of account."""
    if torch.is_autocast_enabled(tensors[0].device.type) or not tensors[0].numel():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


class CompiledCompactExecutor(CompactExecutor, BlockCompiler):
    """Compact execution with compiled blocks.

    Args:
        slice_budget: See `CompactExecutor`.
        table_budget: See `CompactExecutor`.
        backend: Of `torch.compile`.
    """

    def __init__(
        self, slice_budget: float = 1.0, table_budget: int | None = None, backend: Backend = "inductor"
    ) -> None:
        super().__init__(slice_budget, table_budget)
        self._backend = backend
        self._graph = GraphBySequences(compact_block, backend)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model packs and compiles its own."""
        return type(self), (self._slice_budget, self._table_budget, self._backend)

    def run_block(
        self,
        block: DynamicBlock,
        tokens: Tensor,
        modulation: BranchModulation,
        width: BlockWidth,
        gating: Gating,
        index: int,
    ) -> tuple[Tensor, Tensor] | None:
        """See `BlockCompiler`."""
        if not isinstance(width, CompactWidth) or max(len(width.head_parts), len(width.group_parts)) > 1:
            return None
        heads, groups = width.head_parts[0].active, width.group_parts[0].active
        offsets = token_offsets(gating, index, tokens) if heads and groups else None
        if offsets is None:
            return None
        values = side_by_side(modulation)
        layers = (block.token_router.reduce, block.token_router.score)
        router = tuple(part for layer in layers for part in (plain(layer.weight), layer.bias))

        def with_weights(attention: Slice, mlp: Slice) -> tuple[Tensor, Tensor] | None:
            # Samples of several timesteps may have weights of their own each.
            if attention.is_timed or mlp.is_timed:
                return None
            if not runs_in_a_graph(tokens, values, attention.leave_bias, mlp.leave_bias, *router):
                return None
            weights = attention_inputs(attention.scaled()), mlp_inputs(mlp.scaled())
            found: tuple[Tensor, Tensor] | None = self._graph(
                tokens.contiguous(),
                values,
                *weights,
                router,
                offsets,
                block.attn.head_dim,
                (block.norm1.eps, block.norm2.eps),
                sequences=block.attn.sequences,
            )
            return found

        return self._run(
            block.attn,
            heads,
            width,
            lambda attention: self._run(block.mlp, groups, width, partial(with_weights, attention)),
        )


class CompiledStaticExecutor(StaticExecutor, BlockCompiler):
    """Static execution with compiled blocks.

    Args:
        backend: Of `torch.compile`.
    """

    def __init__(self, backend: Backend = "inductor") -> None:
        self._backend = backend
        self._graph = GraphBySequences(static_block, backend)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model compiles its own."""
        return type(self), (self._backend,)

    def run_block(
        self,
        block: DynamicBlock,
        tokens: Tensor,
        modulation: BranchModulation,
        width: BlockWidth,
        gating: Gating,
        index: int,
    ) -> tuple[Tensor, Tensor] | None:
        """See `BlockCompiler`."""
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        # An adapter's layer is more than its weight.
        if any(type(layer) is not nn.Linear for layer in layers):
            return None
        weights = tuple(part for layer in layers for part in (plain(layer.weight), layer.bias))
        values = side_by_side(modulation)
        if not runs_in_a_graph(tokens, values, *weights):
            return None
        found: Tensor | None = self._graph(
            tokens.contiguous(),
            values,
            weights,
            block.attn.num_heads,
            (block.norm1.eps, block.norm2.eps),
            sequences=block.attn.sequences,
        )
        return None if found is None else (found, self.select(block.token_router, tokens, gating, index))
