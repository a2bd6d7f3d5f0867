"""The parts of a run, put together from its settings: what trains, what follows it, and what it is taught by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from dydit_cli.dynamic.routers import keep_everything
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.objectives import Objective, objective_of
from dydit_cli.objectives.diffusion import DiffusionObjective
from dydit_cli.objectives.rectified import RectifiedFlowObjective
from dydit_cli.processes.world import ALONE, World
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.accelerator import make_accelerator
from dydit_cli.training.average import MovingAverage
from dydit_cli.training.method import begin_method, below
from dydit_cli.training.optimiser import make_optimiser
from dydit_cli.training.sharding import Autocast, ShardedTeacher, shard
from dydit_cli.training.step import Denoiser
from dydit_cli.training.targets import Cost, cost_of
from dydit_cli.training.teacher import FrozenTeacher, Teacher

TIMESTEP_KEYS = ("timestep_location", "timestep_scale", "timestep_shift")
DAMAGES_GUIDANCE = (
    "The model's guidance was distilled from another model, and loss 'denoising' trains it on data alone, which damages it: "
    "leave loss at distillation, unless the data are all that it should know."
)


@dataclass
class TrainingParts:
    """What a run is made of.

    Attributes:
        model: What trains.
        average: Its moving average, which is what is evaluated and saved.
        optimiser: AdamW, as accelerate wraps it.
        denoiser: The model's forward, as accelerate wraps it.
        accelerator: Autocast, gradient scaling, reductions.
        objective: The family's, with the recipe's distribution of timesteps and weights of noise levels.
        measured: The same without weights: held-out losses are of all noise levels alike, whatever was trained on.
        teacher: Whose predictions are learned, or None for the data's own targets.
        cost: What the target refers to.
        dynamic: Whether masks train; else everything is on, which is the static control.
        device: Where.
        world: The processes that train together.
        warnings: What looked odd, for the console.
    """

    model: DynamicModel
    average: MovingAverage
    optimiser: torch.optim.Optimizer
    denoiser: nn.Module
    accelerator: Accelerator
    objective: Objective
    measured: Objective
    teacher: Teacher | None
    cost: Cost
    dynamic: bool
    device: torch.device
    world: World
    warnings: list[str]


def assemble(
    settings: FinetuneSection, model: DynamicModel, device: torch.device, world: World = ALONE
) -> TrainingParts:
    """Put the parts of a run together; ``model`` is changed into what trains.

    Args:
        settings: The recipe's section.
        model: Whole, also where it is to be spread over processes.
        device: Of this process.
        world: The processes that train together.

    Raises:
        DyditError: If the settings do not fit the model or the machine.
    """
    warnings = []
    loss = _loss_of(settings, model)
    if loss == "denoising" and bool(model.config.get("guidance_embeds", False)):
        warnings.append(DAMAGES_GUIDANCE)
    # A target of 1 is the static control: everything on, routers frozen, all else equal.
    dynamic = settings.target_ratio < 1 or settings.budgets is not None
    if not dynamic:
        keep_everything(model)
        for parameter in model.router_parameters():
            parameter.requires_grad_(False)
    # Before anything is loaded from a checkpoint: a resumed run has the teacher that it was started with.
    sharded = settings.sharding == "fsdp2" and world.joined
    # In fp32 as in one process: neither teacher nor average runs under autocast.
    spread = partial(shard, world=world, device=device, mixed_precision="no")
    begin_method(settings, model)
    teacher: Teacher | None = None
    if loss == "distillation":
        shares = settings.method != "full"
        teacher = (
            ShardedTeacher(model, spread) if sharded else FrozenTeacher(below(model), shares_weights=shares)
        )
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    average = MovingAverage(model, settings.ema_decay, spread if sharded else None)
    accelerator = make_accelerator(device, settings.mixed_precision, world)
    # After sharding, which replaces parameters. accelerate would wrap what is sharded once more, so it is not shown that.
    root = shard(model, world, device, settings.mixed_precision) if sharded else Denoiser(model)
    optimiser = accelerator.prepare(
        make_optimiser(
            model,
            learning_rate=settings.learning_rate,
            router_learning_rate=settings.router_learning_rate or settings.learning_rate,
            weight_decay=settings.weight_decay,
            kind=settings.optimiser,
        )
    )
    denoiser = Autocast(root, accelerator) if sharded else accelerator.prepare(root)
    measured = _objective(settings, model)
    return TrainingParts(
        model=model,
        average=average,
        optimiser=optimiser,
        denoiser=denoiser,
        accelerator=accelerator,
        objective=_weighted(measured, settings, model),
        measured=measured,
        teacher=teacher,
        cost=cost_of(settings, model),
        dynamic=dynamic,
        device=device,
        world=world,
        warnings=warnings,
    )


def _weighted(objective: Objective, settings: FinetuneSection, model: DynamicModel) -> Objective:
    """``objective`` with the recipe's weights of noise levels.

    Raises:
        DyditError: if they are given for a family that has none.
    """
    if settings.snr_gamma is None:
        return objective
    if not isinstance(objective, DiffusionObjective):
        raise DyditError(
            f"snr_gamma cannot be set for a {family_of(model).title}.",
            why="It weights predictions of noise; this family predicts velocities.",
            fix="Leave it out.",
        )
    return DiffusionObjective(settings.snr_gamma)


def _objective(settings: FinetuneSection, model: DynamicModel) -> Objective:
    """The objective of the model's family with the recipe's distribution of timesteps.

    Raises:
        DyditError: if one is given for a family that has none.
    """
    objective = objective_of(model)
    if isinstance(objective, RectifiedFlowObjective):
        return replace(
            objective,
            location=settings.timestep_location,
            scale=settings.timestep_scale,
            shift_draws=settings.timestep_shift,
        )
    given = [
        key for key in TIMESTEP_KEYS if getattr(settings, key) != FinetuneSection.model_fields[key].default
    ]
    if given:
        raise DyditError(
            f"{', '.join(given)} cannot be set for a {family_of(model).title}.",
            why="Its timesteps are drawn evenly; only rectified flow (FLUX) prefers some of them.",
            fix="Leave it out.",
        )
    return objective


def _loss_of(settings: FinetuneSection, model: DynamicModel) -> str:
    if settings.loss != "auto":
        return settings.loss
    return "distillation" if family_of(model).objective == "rectified-flow" else "denoising"
