"""One training step: the noisy batch, the forward passes, the loss.

L = L_denoise + w * (mean ratio - target)^2, and while the complete branch lasts, L_denoise of the complete
model on the same noisy batch besides. Its target is the true noise: it stabilises, it does not distil (DyDiT,
arXiv 2410.03456, section 3.4). Distillation is another matter: there L_denoise is the squared distance to the
prediction of a teacher for the same noisy batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dydit_cli.data.batches import Batch
from dydit_cli.dynamic.gates import CompleteGating, Gating, GumbelGating, RoutingNoise
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.resolution import geometry_of
from dydit_cli.families.text_condition import Condition, TextCondition
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives import Objective
from dydit_cli.randomness import normal, uniform
from dydit_cli.training.targets import Cost
from dydit_cli.training.teacher import Teacher

GUIDANCE_RANGE = (1.0, 5.0)
"""Strengths of distilled guidance that training draws from, evenly."""


class Denoiser(nn.Module):
    """A model as accelerate and DDP want it: one forward that makes all predictions of a step.

    Args:
        model: The model that trains.
    """

    def __init__(self, model: DynamicModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, noisy: Tensor, t: Tensor, condition: Condition, branches: Sequence[tuple[str, Gating]]
    ) -> list[tuple[Tensor, Routing]]:
        """Predict once a branch, which names its execution: prediction (B, C_out, h, w) and the masks."""
        return [
            self.model.denoise(
                noisy, t, condition, executor=self.model.make_executor(execution), gating=gating
            )
            for execution, gating in branches
        ]


@dataclass(frozen=True)
class NoisyBatch:
    """A batch with everything that is drawn for it; every draw is a function of (seed, step, global index).

    Attributes:
        clean: (B, C, h, w).
        noise: (B, C, h, w).
        noisy: (B, C, h, w), their mixture at ``t``.
        t: (B,), stratified.
        condition: (B,) labels, some replaced by the null class; or texts, with guidance drawn for models that take it.
        routing_noise: For the Gumbel gates.
        ratio_weights: (B,) weights of the samples in the mean ratio, 1 on average over the global batch; None for equal ones.
    """

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    condition: Condition
    routing_noise: RoutingNoise
    ratio_weights: Tensor | None = None

    def parts(self, count: int) -> list[NoisyBatch]:
        """The batch cut into ``count`` equal parts, in its order."""
        size = len(self.clean) // count
        return [self._rows(slice(start, start + size)) for start in range(0, size * count, size)]

    def _rows(self, rows: slice) -> NoisyBatch:
        return NoisyBatch(
            self.clean[rows],
            self.noise[rows],
            self.noisy[rows],
            self.t[rows],
            self.condition[rows],
            self.routing_noise.rows(rows),
            None if self.ratio_weights is None else self.ratio_weights[rows],
        )


def draw(
    batch: Batch,
    objective: Objective,
    geometry: Geometry,
    *,
    seed: int,
    step: int,
    label_dropout: float,
    device: torch.device,
    reduce_mean: Callable[[Tensor], Tensor] = lambda value: value,
) -> NoisyBatch:
    """Noise a batch for the (0-based) ``step``. Numbers are drawn on the CPU, so that every device trains
    on the same ones. ``reduce_mean`` is the mean of a tensor over processes.
    """

    def uniforms(name: str) -> Tensor:
        return torch.stack([uniform(seed, (), name, step, index) for index in batch.indices])

    shape = tuple(batch.clean.shape[1:])
    at_shape, geometry = objective.for_shape(shape), geometry_of(geometry, batch.clean.shape, batch.condition)
    clean = batch.clean.to(device)
    noise = torch.stack([normal(seed, shape, "noise", step, index) for index in batch.indices]).to(device)
    t = at_shape.draw_timesteps(uniforms("timestep"), batch.indices).to(device)
    weights = at_shape.ratio_weights(t)
    if weights is not None:
        # Normalised by what was drawn: a batch of heavy samples must not pass for a costly model.
        weights = weights / reduce_mean(weights.mean())
    return NoisyBatch(
        clean=clean,
        noise=noise,
        noisy=at_shape.noised(clean, noise, t),
        t=t,
        condition=drawn_condition(batch.condition, uniforms, geometry.num_classes, label_dropout).to(device),
        routing_noise=RoutingNoise.draw(geometry, seed, step, batch.indices, device),
        ratio_weights=weights,
    )


def drawn_condition(
    condition: Condition, uniforms: Callable[[str], Tensor], num_classes: int, label_dropout: float
) -> Condition:
    """Conditions as a step trains on them.

    Args:
        condition: Of the batch.
        uniforms: (B,) uniform numbers by name.
        num_classes: Number of the null class, which a share ``label_dropout`` of labels becomes; 0 where there is none.
        label_dropout: That share. Texts are not dropped: guidance-distilled models have no null text.
    """
    if isinstance(condition, TextCondition):
        if condition.guidance is None:
            return condition
        low, high = GUIDANCE_RANGE
        return replace(condition, guidance=low + (high - low) * uniforms("guidance"))
    if not num_classes:
        return condition
    dropped = uniforms("label_dropout") < label_dropout
    return torch.where(dropped, num_classes, condition)


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
    """The mean over processes, and over the parts of an accumulated batch, with the gradient of what is at hand.

    The paper's ratio is a mean over the global batch. Since DDP averages gradients, adding the difference to
    the other processes as a constant gives the exact gradient of the squared global mean; squaring each local
    mean would not. The same holds for the parts of a batch whose gradients are averaged one after the other.
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
    teacher: Teacher | None = None,
    noise_scale: float = 1.0,
    budget: float | None = None,
    cost: Cost = executed_ratio,
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
        reduce_mean: From the mean ratio at hand to that of the global batch.
        teacher: Whose predictions are matched; the data's own targets are, without one.
        noise_scale: Of the routing noise; see `GumbelGating`.
        budget: What the routers are told, of a model with budgets.
        cost: What the target refers to.
    """
    # Static execution of the complete model is dense execution with everything on, bit for bit, and a little
    # faster.
    complete: tuple[str, Gating] = ("static", CompleteGating())
    gating = GumbelGating(batch.routing_noise, temperature, noise_scale, budget)
    sampled: tuple[str, Gating] = ("dense", gating)
    branches = [sampled if dynamic else complete] + ([complete] if complete_branch else [])
    outcomes = denoiser(batch.noisy, batch.t, batch.condition, branches)
    taught = teacher.predict(batch.noisy, batch.t, batch.condition) if teacher is not None else None
    parts = [_parts(objective, prediction, batch, taught) for prediction, _ in outcomes]
    ratio = global_mean(mean_ratio(outcomes[0][1], geometry, batch, cost), reduce_mean)
    ratio_loss = (ratio - target) ** 2
    total = sum((part["loss"] for part in parts), start=ratio_weight * ratio_loss)
    terms = {("denoising" if name == "loss" else name): value.detach() for name, value in parts[0].items()}
    terms["ratio_loss"] = ratio_loss.detach()
    if complete_branch:
        terms["complete"] = parts[1]["loss"].detach()
    return StepLoss(total, terms, ratio.detach())


def mean_ratio(
    routing: Routing, geometry: Geometry, batch: NoisyBatch, cost: Cost = executed_ratio
) -> Tensor:
    """The mean ratio of a batch's cost, weighted as its timesteps ask for; a scalar with gradient."""
    ratios = cost(routing, geometry_of(geometry, batch.clean.shape, batch.condition))
    return (ratios if batch.ratio_weights is None else batch.ratio_weights * ratios).mean()


def _parts(
    objective: Objective, prediction: Tensor, batch: NoisyBatch, taught: Tensor | None
) -> dict[str, Tensor]:
    """Scalar losses of a prediction by name; ``loss`` is to be minimised."""
    losses = objective.losses(prediction, batch.clean, batch.noise, batch.t)
    means = {name: values.mean() for name, values in losses.items()}
    if taught is None:
        return means
    # What the data say is reported besides, and trains nothing.
    distance = ((prediction.float() - taught.float()) ** 2).mean()
    return {"loss": distance, "data": means["loss"].detach()}
