"""What a fine-tuning run will take: parameters that train, memory, disk, time.

Parameters and sizes come from the model class itself, built without storage, so that a model of any size is priced in seconds.
Activations are what autograd would keep for the backward pass, counted on tensors without storage as well. Time is measured: two
steps of this very run where they can be made, else smaller batches from which the step is extrapolated, else an estimate from
multiply-accumulates and the speed of a matrix product here; which of the three it was is always said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dydit_cli.adapters.attaching import adapter_parameters, trainable_share
from dydit_cli.dynamic.gates import CompleteGating, Gating, GumbelGating, RoutingNoise
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from dydit_cli.families.registry import family_of
from dydit_cli.flops import count_macs
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.budgets import with_budgets
from dydit_cli.training.method import begin_method, changing_state

FP32 = 4
BACKWARD = 2.0
"""MACs of a backward pass, in forward passes."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        static: Of the static model.
        routers: That were added to it.
        trained: That train.
        share: Of those that train, in the static model's.
    """

    static: int
    routers: int
    trained: int
    share: float


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of each process; its libraries and what kernels take for themselves come on top.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of what trains.
        moments: Of AdamW.
        average: The moving average of what changes: a whole model, or adapters and routers.
        teacher: The frozen copy of self-distillation; 0 without.
        activations: Kept for the backward pass of one part of a batch.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    teacher: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Disk:
    """Bytes that the run writes.

    Attributes:
        checkpoint: One.
        kept: Checkpoints that are there at the same time, the one being written included.
        artifact: The final weights.
    """

    checkpoint: int
    kept: int
    artifact: int

    @property
    def total(self) -> int:
        """The most that is there at any time."""
        return self.checkpoint * self.kept + self.artifact


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a run.

    Attributes:
        forward: Of one sample through the complete model.
        step: Of a step of the whole batch, backward pass and further branches included.
        complete_step: Of a step in which the complete branch trains as well.
        complete_steps: How many of those there are.
        evaluations: Of all evaluations on held-out samples.
    """

    forward: float
    step: float
    complete_step: float
    complete_steps: int
    evaluations: float


@dataclass(frozen=True)
class RunPlan:
    """What a run takes, but for time.

    Attributes:
        family: Name of the model's family.
        geometry: Numbers of the model.
        parameters, memory, disk, work: See there.
    """

    family: str
    geometry: dict[str, Any]
    parameters: Parameters
    memory: Memory
    disk: Disk
    work: Work

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "family": self.family,
            "geometry": self.geometry,
            "parameters": asdict(self.parameters),
            "trainable_share": self.parameters.share,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "disk_bytes": {**asdict(self.disk), "total": self.disk.total},
            "macs": asdict(self.work),
        }


def plan_run(settings: FinetuneSection, family: Family, config: Mapping[str, Any]) -> RunPlan:
    """Price a run whose model is known by its family and configuration; its files need not exist.

    Raises:
        DyditError: If its settings do not fit the model.
    """
    with torch.device("meta"):
        model = trained_model(settings, family, config)
    begin_method(settings, model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    added = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    static = sum(parameter.numel() for parameter in model.parameters()) - added - routers
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    # What is averaged and put into checkpoints: all of it, or adapters and routers.
    changing = sum(tensor.nbytes for tensor in changing_state(model).values())
    # Beside adapters, the frozen weights themselves teach.
    teacher = weights if distils(settings, model) and settings.method == "full" else 0
    spread = settings.processes if settings.sharding == "fsdp2" else 1
    moments = trained * (2 if settings.optimiser == "adamw8bit" else 2 * FP32)
    memory = Memory(
        weights=weights // spread,
        gradients=FP32 * trained // spread,
        moments=moments // spread,
        average=changing // spread,
        teacher=teacher // spread,
        activations=_activations(settings, family, config),
    )
    disk = Disk(checkpoint=2 * changing + moments, kept=settings.keep_checkpoints + 1, artifact=weights)
    parameters = Parameters(static, routers, trained, trainable_share(model))
    work = _work(settings, model)
    return RunPlan(family.name, asdict(model.geometry), parameters, memory, disk, work)


def trained_model(settings: FinetuneSection, family: Family, config: Mapping[str, Any]) -> DynamicModel:
    """The model of a run with fresh weights, before adapters: what trains, or what they are attached to, requires a gradient."""
    model: DynamicModel = family.model_class(**{k: v for k, v in config.items() if not k.startswith("_")})
    model.set_execution("dense")
    model.train()
    if settings.budgets is not None:
        model = with_budgets(model, settings.budgets, settings.target_ratio)
    for parameter in (*model.backbone_parameters(), *model.router_parameters()):
        parameter.requires_grad_(True)
    if settings.target_ratio == 1 and settings.budgets is None:
        for parameter in model.router_parameters():
            parameter.requires_grad_(False)
    return model


def distils(settings: FinetuneSection, model: DynamicModel) -> bool:
    """Whether the run learns from a frozen copy of its model."""
    if settings.loss == "auto":
        return family_of(model).objective == "rectified-flow"
    return settings.loss == "distillation"


def samples_at_once(settings: FinetuneSection) -> int:
    """Samples whose activations a process holds at the same time."""
    return max(1, settings.batch_size // (settings.processes * settings.accumulate))


def _activations(settings: FinetuneSection, family: Family, config: Mapping[str, Any]) -> int:
    """Bytes that autograd keeps, extrapolated from one and two samples: they grow evenly.

    Adapters keep about as much as full training does: their own inputs are those of the layers that they adapt.
    """
    dynamic = settings.target_ratio < 1 or settings.budgets is not None
    # Tensors without storage that know their device, which autocast asks for and the meta device does not have.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = trained_model(settings, family, config)
        one, two = (_kept_bytes(settings, model, batch, dynamic) for batch in (1, 2))
    samples = samples_at_once(settings)
    total = one + (samples - 1) * (two - one)
    if not settings.gradient_checkpointing:
        return total
    # Recomputed block by block: the inputs of all, and the inside of one.
    geometry = model.geometry
    tokens = geometry.num_tokens + getattr(geometry, "text_tokens", 0)
    return total // geometry.depth + geometry.depth * samples * tokens * geometry.hidden_size * FP32


def _kept_bytes(settings: FinetuneSection, model: DynamicModel, batch: int, dynamic: bool) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    # The storages themselves are kept, so that no later one takes the number of one that is gone.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    sample, condition = model.example_inputs(batch, 0)
    times = torch.full((batch,), 0.5)
    noise = RoutingNoise.draw(model.geometry, 0, 0, range(batch), torch.device("cpu"))
    sampled: tuple[str, Gating] = ("dense", GumbelGating(noise, settings.temperature, 1.0, None))
    complete: tuple[str, Gating] = ("static", CompleteGating())
    branches = [sampled if dynamic else complete]
    if dynamic and settings.complete_branch_steps:
        branches.append(complete)
    autocast = torch.autocast(
        "cpu", dtype=torch.bfloat16, enabled=settings.mixed_precision != "no"
    )  # fp16 keeps as many bytes
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        for execution, gating in branches:
            prediction, _ = model.denoise(
                sample, times, condition, executor=model.make_executor(execution), gating=gating
            )
            prediction.float().square().mean()
    return sum(storage.nbytes() for storage in kept.values())


def _work(settings: FinetuneSection, model: DynamicModel) -> Work:
    forward = count_macs(model).total
    teacher = forward if distils(settings, model) else 0.0
    step = settings.batch_size * ((1 + BACKWARD) * forward + teacher)
    dynamic = settings.target_ratio < 1 or settings.budgets is not None
    last = min(settings.complete_branch_steps, settings.steps) if dynamic else 0
    evaluations = settings.steps // settings.evaluate_every if settings.evaluate_every else 0
    return Work(
        forward=forward,
        step=step,
        complete_step=step + settings.batch_size * (1 + BACKWARD) * forward,
        complete_steps=math.ceil(last / settings.complete_branch_every),
        evaluations=evaluations * settings.evaluate_images * forward,
    )
