"""What a model does at evaluation, measured on held-out data: its MACs ratio and its denoising loss.

Training samples masks from probabilities, evaluation thresholds them, and only the second is what a user pays
for. The ratio here is the one that targets refer to: thresholds, no noise, mean over 1,000 held-out images
noised at 50 stratified timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit_cli.data.source import Source
from dydit_cli.dynamic.gates import ThresholdGating
from dydit_cli.execution import Executor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.resolution import geometry_of
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives.draws import BATCH_SIZE, IMAGES, TIMESTEPS, HeldOutDraws
from dydit_cli.objectives.objective import Objective


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
    """

    ratio: float
    standard_error: float
    images: int
    heads: float
    groups: float
    tokens: float
    losses: dict[str, float]
    per_timestep: tuple[TimestepReport, ...]


@torch.no_grad()
def measure(
    model: DynamicModel,
    draws: HeldOutDraws,
    *,
    executor: Executor | None = None,
    device: torch.device | str | None = None,
) -> RatioReport:
    """Measure ratio and loss in one pass: thresholds with the model's ``keep_bias``, no noise on the routing,
    true labels.

    Args:
        model: Its weights are those to be judged (the moving average's, in training).
        draws: The pairs of image, timestep and noise; the same ones make even small differences between
        models count.
        executor: How masks become arithmetic; the model's own by default.
        device: Where to put the samples; the model's device by default.
    """
    gating = ThresholdGating(model.keep_bias)
    columns = ["ratio", "heads", "groups", "tokens"]
    rows: dict[float, list[Tensor]] = {}
    for batch in draws.batches(device or model.device):
        noisy = draws.objective.noised(batch.clean, batch.noise, batch.t)
        prediction, routing = model.denoise(noisy, batch.t, batch.condition, executor=executor, gating=gating)
        geometry = geometry_of(model.geometry, noisy.shape, batch.condition)
        losses = draws.objective.losses(prediction, batch.clean, batch.noise, batch.t)
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
        rows.setdefault(float(batch.t[0]), []).append(values.cpu().double())
    levels = {t: torch.cat(parts) for t, parts in sorted(rows.items())}
    everything = torch.cat(list(levels.values()))
    spread = sum(float(((values[:, 0] - values[:, 0].mean()) ** 2).sum()) for values in levels.values())
    means = dict(zip(columns, everything.mean(dim=0).tolist(), strict=True))
    return RatioReport(
        standard_error=spread**0.5 / len(everything),
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
