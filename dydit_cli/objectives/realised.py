"""What a model does at evaluation, measured on held-out data: its MACs ratio and its denoising loss.

Training samples masks from probabilities, evaluation thresholds them, and only the second is what a user pays
for. The ratio here is the one that targets refer to: thresholds, no noise, mean over 1,000 held-out images
noised at 50 stratified timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.data.source import Source
from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution import Executor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.resolution import geometry_of
from dydit_cli.families.text_condition import Condition
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives.draws import BATCH_SIZE, IMAGES, TIMESTEPS, HeldOutDraws
from dydit_cli.objectives.objective import Objective
from dydit_cli.processes.world import ALONE, World

Denoise = Callable[[Tensor, Tensor, Condition, Gating], tuple[Tensor, Routing]]
"""(noisy, t, condition, gating) -> the prediction and the masks of every block."""


@dataclass(frozen=True)
class TimestepReport:
    """What is executed at one timestep, as shares of the static model.

    Attributes:
        t: In the family's own convention.
        noise_level: 1 is pure noise.
        ratio: Of attention and MLP MACs.
        heads, groups, tokens: Of active units, mean over blocks and images.
    """

    t: float
    noise_level: float
    ratio: float
    heads: float
    groups: float
    tokens: float


@dataclass(frozen=True)
class RatioReport:
    """The realised ratio of a model, and how well it denoises at that.

    Attributes:
        ratio: Mean over all images and timesteps.
        standard_error: Of that mean, from the spread of images within their timestep.
        images: Held-out images used.
        heads, groups, tokens: Shares of active units.
        losses: The denoising loss (``loss``) and its parts, means over the same forward passes.
        per_timestep: The same for each timestep, in the order of t.
        cost: Mean of the other cost that was asked for, relative to the static model; None where none was.
    """

    ratio: float
    standard_error: float
    images: int
    heads: float
    groups: float
    tokens: float
    losses: dict[str, float]
    per_timestep: tuple[TimestepReport, ...]
    cost: float | None = None

    @property
    def targeted(self) -> float:
        """What a target refers to: the other cost where there is one, MACs otherwise."""
        return self.ratio if self.cost is None else self.cost


@torch.no_grad()
def measure(
    model: DynamicModel,
    draws: HeldOutDraws,
    *,
    executor: Executor | None = None,
    device: torch.device | str | None = None,
    denoise: Denoise | None = None,
    world: World = ALONE,
    cost: Callable[[Routing, Geometry], Tensor] | None = None,
) -> RatioReport:
    """Measure ratio and loss in one pass: thresholds with the model's ``keep_bias``, no noise on the routing,
    true labels.

    Args:
        model: Its weights are those to be judged (the moving average's, in training).
        draws: The pairs of image, timestep and noise; the same ones make even small differences between
        models count.
        executor: How masks become arithmetic; the model's own by default.
        device: Where to put the samples; the model's device by default.
        denoise: How to call a model whose weights are spread over processes; ``executor`` is not used then.
        world: Processes that share the samples; all of them get the report.
        cost: (B,) of another cost, to be measured as well.
    """

    def plainly(noisy: Tensor, t: Tensor, condition: Condition, gating: Gating) -> tuple[Tensor, Routing]:
        return model.denoise(noisy, t, condition, executor=executor, gating=gating)

    denoise, gating = denoise or plainly, ThresholdGating(model.keep_bias)
    columns = ["ratio", "heads", "groups", "tokens"]
    measured: list[tuple[float, Tensor]] = []
    for batch in draws.batches(device or model.device, world):
        noisy = draws.objective.noised(batch.clean, batch.noise, batch.t)
        prediction, routing = denoise(noisy, batch.t, batch.condition, gating)
        geometry = geometry_of(model.geometry, noisy.shape, batch.condition)
        losses = draws.objective.losses(prediction, batch.clean, batch.noise, batch.t)
        if cost is not None:
            losses = {**losses, "cost": cost(routing, geometry)}
        columns[4:] = losses
        shares = [masks.float().mean(dim=(1, 2)) for masks in (routing.heads, routing.groups, routing.tokens)]
        values = torch.stack(
            [
                executed_ratio(routing, geometry),
                *shares,
                *losses.values(),
            ],
            dim=1,
        )
        measured.append((float(batch.t[0]), values.cpu().double()[: 0 if batch.stands_in else None]))
    rows: dict[float, list[Tensor]] = {}
    # Batch by batch and in the order of processes: the order of one process alone.
    for parts in zip(*world.gather(measured), strict=True):
        for t, values in parts:
            rows.setdefault(t, []).append(values)
    levels = {t: torch.cat(parts) for t, parts in sorted(rows.items())}
    # Timesteps weigh alike, also where the images do not divide by their number and some of them see one image more.
    by_level = torch.stack([values.mean(dim=0) for values in levels.values()])
    variance = sum(float(values[:, 0].var(correction=0)) / len(values) for values in levels.values())
    means = dict(zip(columns, by_level.mean(dim=0).tolist(), strict=True))
    return RatioReport(
        cost=means.pop("cost", None),
        standard_error=variance**0.5 / len(levels),
        images=min(draws.images, len(draws.source)),
        **{name: means.pop(name) for name in columns[:4]},
        losses=means,
        per_timestep=tuple(
            TimestepReport(
                t,
                float(draws.objective.noise_level(torch.tensor([t]))[0]),
                *values[:, :4].mean(dim=0).tolist(),
            )
            for t, values in levels.items()
        ),
    )


def held_out_ratio(
    model: DynamicModel,
    source: Source,
    objective: Objective,
    *,
    images: int = IMAGES,
    timesteps: int = TIMESTEPS,
    per_image: int = 1,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    executor: Executor | None = None,
    device: torch.device | str | None = None,
) -> RatioReport:
    """`measure` on draws made of plain arguments, which `HeldOutDraws` explains."""
    draws = HeldOutDraws(source, objective, images, timesteps, per_image, batch_size, seed)
    return measure(model, draws, executor=executor, device=device)


def held_out_loss(
    model: DynamicModel,
    source: Source,
    objective: Objective,
    *,
    images: int = IMAGES,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    executor: Executor | None = None,
    device: torch.device | str | None = None,
) -> float:
    """The mean denoising loss of `measure`, each image at one timestep."""
    draws = HeldOutDraws(source, objective, images, batch_size=batch_size, seed=seed)
    return measure(model, draws, executor=executor, device=device).losses["loss"]
