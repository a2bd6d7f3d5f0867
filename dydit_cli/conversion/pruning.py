"""Static pruning: cut whole heads and single hidden channels out of a model, for good.

The honest rival of a dynamic model of the same cost. Every block is cut to the same share, and which of its units stay is what a
ranking says. That is how the controls of the literature are made: Torch-Pruning, on which Diff-Pruning (arXiv 2305.10924) builds,
ranks inside a layer unless told otherwise, because magnitudes and gradients of different layers have different scales, and a
ranking over all layers can empty a block. The widths stand block by block in the configuration, so that other rules fit as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.conversion.importance.scores import Importance
from dydit_cli.conversion.verification import SAMPLES, TOLERANCE, Verification
from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.errors import DyditError
from dydit_cli.execution import BlockWidth, DynamicBlock, Executor, Modulation, StaticExecutor
from dydit_cli.execution.interface import attention_with, mlp_with, modulate
from dydit_cli.families.cutting import cut_model
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family, Source
from dydit_cli.flops import macs_of
from dydit_cli.objectives import objective_of


@dataclass(frozen=True)
class Pruning:
    """Which units stay.

    Attributes:
        heads: Of each block, (heads left,) int64 stored heads, ascending.
        channels: Of each block, (channels left,) int64 stored hidden channels, ascending.
    """

    heads: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]

    @property
    def block_heads(self) -> list[int]:
        """Heads left in each block."""
        return [len(kept) for kept in self.heads]

    @property
    def block_hidden(self) -> list[int]:
        """Hidden channels left in each block."""
        return [len(kept) for kept in self.channels]


@dataclass(frozen=True)
class PruningReport:
    """What pruning left.

    Attributes:
        ratio: Of attention and MLP MACs, over those of the source.
        heads: Kept heads of each block, by number in the source.
        hidden: Number of kept hidden channels of each block.
        source_gmacs: Of one forward pass of the source.
        source_params: Parameters of the source.
    """

    ratio: float
    heads: list[list[int]]
    hidden: list[int]
    source_gmacs: float
    source_params: int


def check_prunable(family: Family, source: Source, width: str) -> None:
    """See that a source can be pruned.

    Raises:
        DyditError: If it is of a family without blocks of their own width, dynamic, or is to be of another width.
    """
    if "block_heads" not in signature(family.model_class.__init__).parameters:
        raise DyditError(
            f"A {family.title} cannot be pruned.",
            why="Blocks of a width of their own are written for DiT and SiT.",
            fix="Leave prune out.",
        )
    if source.dynamic:
        raise DyditError(
            "This file cannot be pruned.",
            why="It is dynamic already: its routers decide what runs.",
            fix="Prune the static checkpoint that it was made from.",
        )
    if width != "free":
        raise DyditError(
            "A pruned model has no width.",
            why="It is static: there are no routers that could choose units.",
            fix="Leave width out, or leave prune out.",
        )


def choose_units(importance: Importance, geometry: Geometry, ratio: float) -> Pruning:
    """The most important units of each block that together cost ``ratio`` of its attention and MLP.

    The number of heads is the nearest whole one; hidden channels make up for what rounding took or left, to one channel.

    Raises:
        DyditError: If even one head and one channel are more.
    """
    heads, channels = [], []
    for block, cost in enumerate(geometry.block_costs()):
        attention, mlp = (float(macs) for macs in cost.complete)
        head, channel = attention / geometry.num_heads, mlp / geometry.mlp_hidden
        wanted = ratio * (attention + mlp)
        if wanted < head + channel:
            raise DyditError(
                f"A model cannot be pruned to {ratio:g} of its attention and MLP.",
                why=f"One head and one hidden channel of a block are {(head + channel) / (attention + mlp):.3f} of it already.",
                fix="Choose a larger ratio.",
            )
        # Never so many heads that no channel is left.
        most = int((wanted - channel) / head)
        kept = max(1, min(round(ratio * geometry.num_heads), most))
        hidden = max(1, min(geometry.mlp_hidden, round((wanted - kept * head) / channel)))
        heads.append(_best(importance.heads[block], kept))
        channels.append(_best(importance.channels[block], hidden))
    return Pruning(tuple(heads), tuple(channels))


def _best(scores: Tensor, count: int) -> Tensor:
    """The ``count`` units of the highest scores, in the order of the file; ties keep the earlier."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def prune_model(family: Family, source: Source, pruning: Pruning) -> DynamicModel:
    """The static model that is left, in fp32 and eval mode: rows and columns of the other units are gone."""
    tensors = {key: tensor.float() for key, tensor in source.tensors.items()}
    return cut_model(family.model_class, source.config, tensors, pruning.heads, pruning.channels)


class KeptUnits(StaticExecutor):
    """Static execution of the source with the outputs of all other units multiplied by zero.

    Args:
        model: The source.
        pruning: Which units stay.
    """

    def __init__(self, model: DynamicModel, pruning: Pruning) -> None:
        self._masks: dict[torch.nn.Module, Tensor] = {}
        for block, heads, channels in zip(model.dynamic_blocks, pruning.heads, pruning.channels, strict=True):
            self._masks[block.attn] = _mask(heads, block.attn.num_heads)
            self._masks[block.mlp] = _mask(channels, block.mlp.fc1.out_features)

    def attend(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth
    ) -> Tensor:
        """See `Executor`."""
        inputs = modulate(block.norm1(tokens), modulation.shift[:, None], modulation.scale[:, None])
        update = attention_with(block.attn, inputs, self._masks[block.attn])
        return tokens + modulation.gate[:, None] * update

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """See `Executor`."""
        inputs = modulate(block.norm2(tokens), modulation.shift[:, None], modulation.scale[:, None])
        return tokens + modulation.gate[:, None] * mlp_with(block.mlp, inputs, self._masks[block.mlp])


def _mask(kept: Tensor, units: int) -> Tensor:
    return torch.zeros(1, units).index_fill(1, kept, 1.0)


@torch.no_grad()
def verify_pruned(folder: Path, source: DynamicModel, pruning: Pruning, seed: int) -> Verification:
    """Load what was written and compare it with the source whose other units are multiplied by zero.

    Raises:
        DyditError: If they differ by more than rounding.
    """
    model = load_model(folder, execution="static")
    sample, condition = source.example_inputs(SAMPLES, seed)
    times = objective_of(source).grid(SAMPLES)

    def run(which: DynamicModel, executor: Executor) -> Tensor:
        output, _ = which.denoise(sample, times, condition, executor=executor, gating=CompleteGating())
        return output

    masked = run(source, KeptUnits(source, pruning))
    static, compact = (run(model, model.make_executor(name)) for name in ("static", "compact"))
    scale = float(masked.abs().max())
    of_static, of_compact = (
        float((found - masked).abs().max()) / max(scale, 1e-12) for found in (static, compact)
    )
    if not (of_static <= TOLERANCE and of_compact <= TOLERANCE):
        raise DyditError(
            "The pruned model does not equal its source without the other units.",
            why=f"Largest differences: {of_static:.1e} static, {of_compact:.1e} compact of the output.",
            fix="Nothing was written. Please report this with the checkpoint's origin; it is a defect of dydit.",
        )
    return Verification(weights=0.0, dense=of_static, compact=of_compact, scale=scale, switched_on=1.0)


def pruning_report(source: DynamicModel, pruned: DynamicModel, pruning: Pruning) -> PruningReport:
    """Say what is left of ``source``."""
    before, after = macs_of(source.geometry), macs_of(pruned.geometry)
    return PruningReport(
        ratio=after.routed / before.routed,
        heads=[kept.tolist() for kept in pruning.heads],
        hidden=pruning.block_hidden,
        source_gmacs=before.total / 1e9,
        source_params=count_parameters(source, routers=False),
    )


def count_parameters(model: DynamicModel, *, routers: bool = True) -> int:
    """Numbers in a model's parameters, with or without its routers'."""
    left_out = set() if routers else set(map(id, model.router_parameters()))
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in left_out)
