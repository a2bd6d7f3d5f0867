"""Taylor: how much the loss would change, to first order, if a unit were switched off.

Each unit gets a gate m = 1; its score is the mean over samples of |dL/dm|. The gradient is summed over the tokens of a sample
before the absolute value is taken; a mean of signed gradients would vanish, because a trained model is at an optimum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dydit_cli.conversion.importance.scores import Importance
from dydit_cli.data.source import Source
from dydit_cli.execution import BlockWidth, DynamicBlock, Modulation, StaticExecutor
from dydit_cli.execution.interface import attention_with, mlp_with, modulate
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import Objective
from dydit_cli.randomness import generator, normal, uniform


class GateProbe(StaticExecutor):
    """Static execution with a differentiable gate of one at every head and channel of every sample.

    Args:
        model: The model to probe.
        batch: Samples of a batch.
    """

    def __init__(self, model: DynamicModel, batch: int) -> None:
        geometry = model.geometry
        self.head_gates = [self._ones(model, batch, geometry.num_heads) for _ in model.dynamic_blocks]
        self.channel_gates = [self._ones(model, batch, geometry.mlp_hidden) for _ in model.dynamic_blocks]
        self._gate_of: dict[nn.Module, Tensor] = {}
        for block, heads, channels in zip(
            model.dynamic_blocks, self.head_gates, self.channel_gates, strict=True
        ):
            self._gate_of[block.attn] = heads
            self._gate_of[block.mlp] = channels

    @staticmethod
    def _ones(model: DynamicModel, batch: int, units: int) -> Tensor:
        return torch.ones(batch, units, device=model.device, requires_grad=True)

    def attend(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth
    ) -> Tensor:
        """See `Executor`."""
        inputs = modulate(block.norm1(tokens), modulation.shift[:, None], modulation.scale[:, None])
        return tokens + modulation.gate[:, None] * attention_with(
            block.attn, inputs, self._gate_of[block.attn]
        )

    def feed_forward(
        self, block: DynamicBlock, tokens: Tensor, modulation: Modulation, width: BlockWidth, keep: Tensor
    ) -> Tensor:
        """See `Executor`."""
        inputs = modulate(block.norm2(tokens), modulation.shift[:, None], modulation.scale[:, None])
        return tokens + modulation.gate[:, None] * mlp_with(block.mlp, inputs, self._gate_of[block.mlp])


def taylor(
    model: DynamicModel,
    source: Source,
    objective: Objective,
    *,
    samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Score all heads and channels on ``samples`` training samples at stratified timesteps.

    Args:
        model: Frozen; its parameters get no gradient.
        source: Samples to score on.
        objective: The family's.
        samples: How many; at least 256 are sensible.
        batch_size: Samples a pass.
        seed: Of samples, timesteps and noise.
        on_progress: Called with (done, all) samples.
    """
    geometry, device = model.geometry, model.device
    heads = torch.zeros(geometry.depth, geometry.num_heads)
    channels = torch.zeros(geometry.depth, geometry.mlp_hidden)
    chosen = torch.randperm(len(source), generator=generator(seed, "taylor-order"))[:samples].tolist()
    for start in range(0, len(chosen), batch_size):
        indices = list(range(start, min(start + batch_size, len(chosen))))
        clean = source.batch([chosen[index] for index in indices]).to(device)
        labels = source.labels[[chosen[index] for index in indices]].to(device)
        noise = torch.stack(
            [normal(seed, tuple(clean.shape[1:]), "taylor-noise", index) for index in indices]
        ).to(device)
        uniforms = torch.stack([uniform(seed, (), "taylor-t", index) for index in indices])
        times = objective.draw_timesteps(uniforms, indices).to(device)
        probe = GateProbe(model, len(indices))
        prediction, _ = model.denoise(objective.noised(clean, noise, times), times, labels, executor=probe)
        loss = objective.losses(prediction, clean, noise, times)["loss"].sum()
        gradients = torch.autograd.grad(loss, [*probe.head_gates, *probe.channel_gates])
        for block in range(geometry.depth):
            heads[block] += gradients[block].abs().sum(dim=0).cpu()
            channels[block] += gradients[geometry.depth + block].abs().sum(dim=0).cpu()
        if on_progress is not None:
            on_progress(indices[-1] + 1, len(chosen))
    details = {"samples": len(chosen), "seed": seed, "data": source.describe()}
    return Importance(heads / len(chosen), channels / len(chosen), "taylor", details)
