"""What an executor is, and what it needs of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.layers import DynamicAttention, DynamicMlp
from dydit_cli.dynamic.routers import ChannelRouter, HeadRouter, TokenRouter
from dydit_cli.dynamic.timed import through
from dydit_cli.execution.units import SlicedLayer


@dataclass(frozen=True)
class Modulation:
    """adaLN-Zero values of one branch, each (B, C)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


BranchModulation = tuple[Modulation, Modulation]


@dataclass(frozen=True)
class StepModulation:
    """All adaLN values of one forward.

    Attributes:
        blocks: Of each block, those of attention and of the MLP.
        final: Shift and scale of the final layer, each (B, C).
    """

    blocks: Sequence[BranchModulation]
    final: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, values: Tensor, depth: int) -> StepModulation:
        """Cut (B, (6 * depth + 2) * C), the outputs of all adaLN layers side by side."""
        channels = values.shape[1] // (6 * depth + 2)
        parts = values.split(channels, dim=1)
        blocks = [
            (Modulation(*parts[6 * index : 6 * index + 3]), Modulation(*parts[6 * index + 3 : 6 * index + 6]))
            for index in range(depth)
        ]
        return cls(blocks, (parts[-2], parts[-1]))


def modulate(inputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """inputs * (1 + scale) + shift, in the original's order of operations."""
    return inputs * (1 + scale) + shift


def modulated(inputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` in one pass over the activations; in fp32 alone, because decisions in bf16 would see fewer roundings than dense."""
    if inputs.dtype == shift.dtype == torch.float32:
        return torch.addcmul(shift, inputs, 1 + scale)
    return modulate(inputs, shift, scale)


def add_gated(tokens: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """tokens + gate * update, in one pass; see `modulated`."""
    if tokens.dtype == gate.dtype == update.dtype == torch.float32:
        return torch.addcmul(tokens, gate, update)
    return tokens + gate * update


@dataclass(frozen=True)
class BlockWidth:
    """The width of one block in one forward pass: (B, H) and (B, G) masks by rank, always-on units included.

    Attributes:
        heads: (B, H).
        groups: (B, G).
        context_groups: (B, G) of the text stream's own MLP, in blocks that have one.
        time: (B, C) timestep embeddings that it was decided from, for layers whose weights follow the timestep; one row if all
            samples share one.
    """

    heads: Tensor
    groups: Tensor
    context_groups: Tensor | None = None
    time: Tensor | None = None

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Those that the block has, in the order of the fields."""
        found = (self.heads, self.groups, self.context_groups)
        return tuple(mask for mask in found if mask is not None)

    def row(self, index: int) -> BlockWidth:
        """That of one sample, as views."""
        parts = (self.heads, self.groups, self.context_groups, self.time)
        return BlockWidth(*(None if part is None else part[index : index + 1] for part in parts))  # type: ignore[arg-type]


class RoutedBlock(Protocol):
    """What deciding widths and keeping slices of weights needs of a block of any form."""

    def decide_width(self, time_embedding: Tensor, gating: Gating, index: int) -> BlockWidth:
        """Ask the width routers of block number ``index``, with the (B, C) timestep embedding."""
        ...

    def complete_width(self, time_embedding: Tensor) -> BlockWidth:
        """Everything on, for as many samples as the (B, C) embedding has; no router is asked."""
        ...

    def sliced_layers(self) -> Sequence[tuple[SlicedLayer, int]]:
        """The layers whose weights are sliced, each with the place in `BlockWidth.masks` of the mask that says how."""
        ...


class DynamicBlock(RoutedBlock, Protocol):
    """The parts of a block of DiT's form that an executor touches."""

    attn: DynamicAttention
    mlp: DynamicMlp
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    head_router: HeadRouter
    channel_router: ChannelRouter
    token_router: TokenRouter


class Executor(Protocol):
    """Runs the dynamic layers of a block. A model holds one and hands it to its blocks; the caller chooses which."""

    name: str

    def widths(
        self, blocks: Sequence[RoutedBlock], timestep: Tensor, time_embedding: Tensor, gating: Gating
    ) -> Sequence[BlockWidth]:
        """Decide the widths of all blocks from the (B, C) timestep embedding; ``timestep`` (B,) names plan entries."""
        ...

    def attend(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth
    ) -> Tensor:
        """tokens + gate * attention(modulate(LN(tokens))) over the active heads; (B, N, C) in and out."""
        ...

    def select(self, router: TokenRouter, tokens: Tensor, gating: Gating, block: int) -> Tensor:
        """(B, N) mask of the tokens that enter the MLP of block number ``block``."""
        ...

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """tokens + keep * gate * MLP(modulate(LN(tokens))) over the active groups; (B, N, C) in and out.

        Where no gradient is recorded, ``tokens`` may be written to and returned.
        """
        ...


@dataclass(frozen=True)
class Step:
    """What is left of a forward once its widths are decided: a function of tensors that gives the same when called again.

    Attributes:
        model: Whose weights are read.
        blocks: Its blocks.
        widths: Of each block.
        gating: Decides the tokens.
        sample: (B, ...) noisy samples.
        condition: (B, C), from which blocks compute adaLN values; None if these are known.
        modulation: (B, (6L + 2) * C) adaLN values, or None.
        compute: Sample, condition and adaLN values -> the prediction, then of each block the (B, T) mask of the tokens that
            entered its MLP.
    """

    model: nn.Module
    blocks: Sequence[DynamicBlock]
    widths: Sequence[BlockWidth]
    gating: Gating
    sample: Tensor
    condition: Tensor | None
    modulation: Tensor | None
    compute: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, ...]]

    def run(self) -> tuple[Tensor, ...]:
        """Compute it."""
        return self.compute(self.sample, self.condition, self.modulation)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that it is a function of."""
        given = (self.sample, self.condition, self.modulation)
        return tuple(tensor for tensor in given if tensor is not None)

    def of(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute it for other tensors like `inputs`."""
        given = iter(inputs)
        places = (self.sample, self.condition, self.modulation)
        return self.compute(*(None if place is None else next(given) for place in places))  # type: ignore[arg-type]


class StepRunner:
    """An executor that is handed a whole step, to run it in its own way or more than once."""

    def run_step(self, step: Step) -> tuple[Tensor, ...]:
        """What `Step.run` gives."""
        raise NotImplementedError


class ConditionedModel(Protocol):
    """What a plan needs of a model."""

    @property
    def dynamic_blocks(self) -> Sequence[RoutedBlock]:
        """The blocks in their order."""
        ...

    def conditioning_modules(self) -> Sequence[nn.Module]:
        """What turns timesteps and labels into adaLN values, the blocks' own layers left out."""
        ...

    def embed_time(self, timestep: Tensor) -> Tensor:
        """(S,) t as `forward` receives it -> (S, C) timestep embeddings."""
        ...

    def router_input(self, time_embedding: Tensor) -> Tensor:
        """(S, C) timestep embeddings -> (S, C), what the width routers read."""
        ...

    def width_gating(self, timestep: Tensor, gating: Gating) -> Gating:
        """The rule that decides widths at (S,) timesteps."""
        ...

    def embed_labels(self, labels: Tensor) -> Tensor:
        """(S,) labels -> (S, C)."""
        ...

    def modulation_values(self, condition: Tensor) -> Tensor:
        """(S, C) conditions -> (S, (6L + 2) * C), see `StepModulation.of`."""
        ...


def attention_with(
    attention: DynamicAttention, inputs: Tensor, head_mask: Tensor | None, time: Tensor | None = None
) -> Tensor:
    """Attention with the stored weights; ``head_mask`` (B, H) by stored head multiplies each head's output if given.

    ``time`` is the (B, C) embedding of `BlockWidth`.
    """
    batch, length, _ = inputs.shape
    qkv = attention.project(inputs, time).view(batch, length, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = attention.sequences.attend(query, key, value)
    if head_mask is not None:
        mixed = mixed * head_mask.to(mixed.dtype)[:, :, None, None]
    return through(attention.proj, mixed.transpose(1, 2).flatten(2), time)


def mlp_with(
    mlp: DynamicMlp, inputs: Tensor, channel_mask: Tensor | None, time: Tensor | None = None
) -> Tensor:
    """The MLP with the stored weights; ``channel_mask`` (B, mlp_hidden) by stored channel multiplies before GELU if given.

    ``time`` is the (B, C) embedding of `BlockWidth`.
    """
    hidden = through(mlp.fc1, inputs, time)
    if channel_mask is not None:
        hidden = hidden * channel_mask.to(hidden.dtype)[:, None, :]
    return through(mlp.fc2, F.gelu(hidden, approximate="tanh"), time)


def live_widths(blocks: Sequence[RoutedBlock], time_embedding: Tensor, gating: Gating) -> list[BlockWidth]:
    """Ask every block's width routers."""
    return [
        replace(block.decide_width(time_embedding, gating, index), time=time_embedding)
        for index, block in enumerate(blocks)
    ]
