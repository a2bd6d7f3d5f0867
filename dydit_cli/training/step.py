"""One training step: the noisy batch, the forward passes, the loss.

L = L_denoise + w * (mean ratio - target)^2, and while the complete branch lasts, L_denoise of the complete
model on the same noisy batch besides. Its target is the true noise: it stabilises, it does not distil (DyDiT,
arXiv 2410.03456, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dydit_cli.data.batches import Batch
from dydit_cli.dynamic.gates import CompleteGating, Gating, GumbelGating, RoutingNoise
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution import DenseExecutor, Executor, StaticExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives import Objective
from dydit_cli.randomness import normal, uniform


class Denoiser(nn.Module):
    """A model as accelerate and DDP want it: one forward that makes all predictions of a step.

    Args:
        model: The model that trains.
    """

    def __init__(self, model: DynamicModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, noisy: Tensor, t: Tensor, labels: Tensor, branches: Sequence[tuple[Executor, Gating]]
    ) -> list[tuple[Tensor, Routing]]:
        """Predict once a branch: prediction (B, C_out, h, w) and the masks."""
        return [
            self.model.denoise(noisy, t, labels, executor=executor, gating=gating)
            for executor, gating in branches
        ]


@dataclass(frozen=True)
class NoisyBatch:
    """A batch with everything that is drawn for it; every draw is a function of (seed, step, global index).

    Attributes:
        clean: (B, C, h, w).
        noise: (B, C, h, w).
        noisy: (B, C, h, w), their mixture at ``t``.
        t: (B,), stratified.
        labels: (B,), some replaced by the null class.
        routing_noise: For the Gumbel gates.
    """

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    labels: Tensor
    routing_noise: RoutingNoise


def draw(
    batch: Batch,
    objective: Objective,
    geometry: Geometry,
    *,
    seed: int,
    step: int,
    label_dropout: float,
    device: torch.device,
) -> NoisyBatch:
    """Noise a batch for the (0-based) ``step``. Numbers are drawn on the CPU, so that every device trains
    on the same ones.
    """

    def uniforms(name: str) -> Tensor:
        return torch.stack([uniform(seed, (), name, step, index) for index in batch.indices])

    shape = tuple(batch.clean.shape[1:])
    clean = batch.clean.to(device)
    noise = torch.stack([normal(seed, shape, "noise", step, index) for index in batch.indices]).to(device)
    t = objective.draw_timesteps(uniforms("timestep"), batch.indices).to(device)
    dropped = uniforms("label_dropout") < label_dropout
    return NoisyBatch(
        clean=clean,
        noise=noise,
        noisy=objective.noised(clean, noise, t),
        t=t,
        labels=torch.where(dropped, geometry.num_classes, batch.labels).to(device),
        routing_noise=RoutingNoise.draw(geometry, seed, step, batch.indices, device),
    )


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step.

    Attributes:
        total: To be minimised.
        terms: Its parts, detached scalars.
        ratio: The mean MACs ratio of the batch, detached.
    """

    total: Tensor
    terms: dict[str, Tensor]
    ratio: Tensor


def global_mean(local: Tensor, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over processes with this process's gradient.

    The paper's ratio is a mean over the global batch. Since DDP averages gradients, adding the difference to
    the other processes as a constant gives the exact gradient of the squared global mean; squaring each local
    mean would not.
    """
    return local + (reduce_mean(local.detach()) - local).detach()


def step_loss(
    denoiser: Callable[..., list[tuple[Tensor, Routing]]],
    objective: Objective,
    geometry: Geometry,
    batch: NoisyBatch,
    *,
    dynamic: bool,
    complete_branch: bool,
    temperature: float,
    target: float,
    ratio_weight: float,
    reduce_mean: Callable[[Tensor], Tensor],
) -> StepLoss:
    """Run the forward passes of a step and add up its loss.

    Args:
        denoiser: A `Denoiser`, as accelerate prepared it.
        objective: Of the model's family.
        geometry: Of the model.
        batch: What to train on.
        dynamic: Whether masks are sampled; else everything is on (the static control).
        complete_branch: Whether the complete model trains on the same batch as well.
        temperature: Of the Gumbel-sigmoid.
        target: Of the mean ratio.
        ratio_weight: w.
        reduce_mean: Mean of a tensor over processes.
    """
    # Static execution of the complete model is dense execution with everything on, bit for bit, and a little
    # faster.
    complete: tuple[Executor, Gating] = (StaticExecutor(), CompleteGating())
    sampled: tuple[Executor, Gating] = (DenseExecutor(), GumbelGating(batch.routing_noise, temperature))
    branches = [sampled if dynamic else complete] + ([complete] if complete_branch else [])
    outcomes = denoiser(batch.noisy, batch.t, batch.labels, branches)
    parts = [
        {
            name: values.mean()
            for name, values in objective.losses(prediction, batch.clean, batch.noise, batch.t).items()
        }
        for prediction, _ in outcomes
    ]
    ratio = global_mean(executed_ratio(outcomes[0][1], geometry).mean(), reduce_mean)
    ratio_loss = (ratio - target) ** 2
    total = sum((part["loss"] for part in parts), start=ratio_weight * ratio_loss)
    terms = {("denoising" if name == "loss" else name): value.detach() for name, value in parts[0].items()}
    terms["ratio_loss"] = ratio_loss.detach()
    if complete_branch:
        terms["complete"] = parts[1]["loss"].detach()
    return StepLoss(total, terms, ratio.detach())
