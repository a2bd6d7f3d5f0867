"""Seconds a step: measured on the run itself, extrapolated from smaller batches, or estimated; and what follows for the whole run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from dydit_cli.artifacts.manifest import device_description
from dydit_cli.data import Batch, DataSplit, TrainingBatches
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.parts import assemble
from dydit_cli.training.planning import RunPlan, samples_at_once, trained_model
from dydit_cli.training.stepping import Stepper

How = Literal["measured", "extrapolated", "estimated"]

PATIENCE_S = 60.0
"""Measuring may take about this long."""
ROOM = 0.8
"""Of the free memory may be used to measure."""
EFFICIENCY = 0.5
"""Of the speed of a large matrix product that a model reaches; for estimates [ours]."""
PRODUCT = 1024


@dataclass(frozen=True)
class Pace:
    """How fast a run goes on a device.

    Attributes:
        step_s: Seconds a step.
        complete_step_s: Seconds a step in which the complete branch trains as well.
        total_s: Seconds of the whole run, evaluations included; sampling and writing are not.
        how: Where ``step_s`` comes from.
        why: If it is not measured: why not.
        data: Whether samples were read from the data, or noise took their place.
        device: In words.
        batch: Samples of the measured steps; 0 if nothing was measured.
    """

    step_s: float
    complete_step_s: float
    total_s: float
    how: How
    why: str
    data: bool
    device: str
    batch: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def pace_of(
    settings: FinetuneSection,
    plan: RunPlan,
    family: Family,
    config: Mapping[str, Any],
    data: DataSplit | None,
    device: torch.device,
    *,
    measure: bool = True,
) -> Pace:
    """Say how fast a run will go.

    Args:
        settings: Of the run.
        plan: What it takes.
        family: Of its model.
        config: Of its model, which is made with fresh weights: time does not depend on them.
        data: What it trains on; noise of the same shape takes its place if not given.
        device: Where.
        measure: Whether steps may be made; else time is estimated.
    """
    speed = EFFICIENCY * settings.processes * _product_speed(device, settings.mixed_precision)
    guess = plan.work.step / speed
    obstacle = _obstacle(settings, plan, device, guess) if measure else "measuring was not asked for"
    if obstacle:
        complete = plan.work.complete_step / speed
        return _pace(settings, plan, (guess, complete), "estimated", obstacle, data, device, 0)
    model = trained_model(settings, family, config).to(device)
    # One process's part of a batch; the others do theirs at the same time.
    share = settings.batch_size // settings.processes
    # Two steps of each kind, and one to warm up.
    affordable = PATIENCE_S / (3 * (2 if plan.work.complete_steps else 1) * guess)
    needed, fitting = samples_at_once(settings), _fitting(settings, plan, device)
    if share == 1 or (affordable >= 1 and fitting >= needed):
        step = _Timer(_alone(settings, share), model, data, device).seconds(share)
        if settings.processes == 1:
            return _pace(settings, plan, step, "measured", "", data, device, share)
        why = f"one of {settings.processes} processes was measured, by itself, on its part of {share}"
        return _pace(settings, plan, step, "extrapolated", why, data, device, share)
    small = max(1, min(int(share * affordable), fitting) // 2)
    timer = _Timer(_alone(settings, 2 * small, accumulate=1), model, data, device)
    halves, wholes = timer.seconds(small), timer.seconds(2 * small)
    plain, complete = (
        whole + max(0.0, whole - half) * (share - 2 * small) / small
        for half, whole in zip(halves, wholes, strict=True)
    )
    cause = "would take too long to try" if fitting >= needed else "does not fit into memory"
    why = f"a step of {share} {cause}; steps of {small} and {2 * small} were measured"
    return _pace(settings, plan, (plain, complete), "extrapolated", why, data, device, 2 * small)


class _Timer:
    """Makes steps on batches of any size and takes their time.

    Args:
        settings: Of the run, for one process.
        model: On the device.
        data: Or None for noise.
        device: Where.
    """

    def __init__(
        self, settings: FinetuneSection, model: DynamicModel, data: DataSplit | None, device: torch.device
    ) -> None:
        self._settings, self._data, self._model = settings, data, model
        self._device = device
        self._stepper = Stepper(settings, assemble(settings, model, device))

    def seconds(self, batch: int) -> tuple[float, float]:
        """Seconds a step of ``batch`` samples, without and with the complete branch; the better of two each."""
        settings = self._settings
        usual = settings.complete_branch_steps
        numbers = [usual, usual, usual]
        if settings.complete_branch_steps:
            every = settings.complete_branch_every
            numbers += [0, every if every < settings.complete_branch_steps else 0]
        taken = []
        for number in numbers:
            started = time.perf_counter()
            self._stepper.step(self._batch(batch, number), number, 0.0)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            taken.append(time.perf_counter() - started)
        plain = min(taken[1:3])
        return plain, min(taken[3:], default=plain)

    def _batch(self, size: int, number: int) -> Batch:
        if self._data is None:
            sample, condition = self._model.example_inputs(size, number)
            return Batch(sample, condition, tuple(range(size)))
        rule = self._data.mirror_rule(self._settings.mirror)
        return TrainingBatches(self._data.train, size, self._settings.seed, rule).at(number)


def _alone(settings: FinetuneSection, batch: int, **more: Any) -> FinetuneSection:
    """The settings of one process with a batch of its own."""
    return settings.model_copy(update={"batch_size": batch, "processes": 1, "sharding": "ddp", **more})


def _obstacle(settings: FinetuneSection, plan: RunPlan, device: torch.device, guess: float) -> str:
    """Why steps cannot be made here, or nothing; ``guess`` is the time of a step."""
    free = free_memory(device)
    fixed = plan.memory.total - plan.memory.activations
    if free is not None and fixed > ROOM * free:
        return (
            f"{fixed / 1e9:.1f} GB without activations do not fit into the {free / 1e9:.1f} GB that are free"
        )
    if settings.sharding == "fsdp2" and settings.processes > 1:
        return "one process alone cannot hold its part of a sharded model"
    if _fitting(settings, plan, device) < 2:
        return "there is no room for the activations of two samples"
    if guess * settings.processes / settings.batch_size * 4 > PATIENCE_S:
        return "a single sample would take too long"
    return ""


def _fitting(settings: FinetuneSection, plan: RunPlan, device: torch.device) -> int:
    """Samples whose activations there is room for, as many as are needed at most."""
    free, needed = free_memory(device), samples_at_once(settings)
    if free is None:
        return max(2, needed)
    room = ROOM * free - (plan.memory.total - plan.memory.activations)
    return max(0, min(max(2, needed), int(room / (plan.memory.activations / needed))))


def _pace(
    settings: FinetuneSection,
    plan: RunPlan,
    seconds: tuple[float, float],
    how: How,
    why: str,
    data: DataSplit | None,
    device: torch.device,
    batch: int,
) -> Pace:
    work, (step, complete) = plan.work, seconds
    # A forward pass costs as much of a step as it has of its MACs.
    evaluations = work.evaluations / work.step * step
    total = (settings.steps - work.complete_steps) * step + work.complete_steps * complete + evaluations
    return Pace(step, complete, total, how, why, data is not None, device_description(device), batch)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, or None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            facts = dict(line.split(":", 1) for line in file)
        return 1024 * int(facts["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        # Comes with accelerate; other systems tell it alone. Apple's GPU has no memory of its own.
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _product_speed(device: torch.device, mixed_precision: str) -> float:
    """MACs a second of a large matrix product on a device."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    left = torch.ones(PRODUCT, PRODUCT, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        product = left @ left
        float(product[0, 0])
        best = min(best, time.perf_counter() - started)
    return PRODUCT**3 / best
