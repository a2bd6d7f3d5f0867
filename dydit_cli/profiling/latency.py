"""Measured time and memory of one model run three ways: static, dense and compact.

Every round runs a few noise levels, from noisy to clean as a sampler does, in each execution (`dydit_cli.profiling.timing` says why
in rounds). Compact execution has a plan of its widths, as in sampling. Wall time, with all threads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dydit_cli.artifacts.manifest import device_description
from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.execution import CompiledStaticExecutor, DenseExecutor, StaticExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import Objective
from dydit_cli.profiling.memory import measure_memory
from dydit_cli.profiling.timing import interleaved, paired_ratio
from dydit_cli.randomness import normal

LEVELS = 5
MEBI = 2**20

MEMORY_METHODS = {
    "cuda": "bytes of CUDA's allocator above what was held before",
    "cpu": "bytes of the tensors alive at once, weights left out; what a kernel takes for itself is not seen",
}


@dataclass(frozen=True)
class LatencyReport:
    """Time and memory of a forward pass of one batch.

    Attributes:
        static_ms, dense_ms, compact_ms: Medians over the rounds of the mean over the noise levels.
        ratio: Compact / static, the median of the rounds' ratios.
        interval: The 95 % bootstrap interval of ``ratio``.
        dense_ratio: Dense / static.
        repetitions: Rounds.
        compiled: Whether the blocks of static and compact execution were compiled while time was measured.
        graphs: Whether their steps were recorded as CUDA graphs then.
        timesteps: Noise levels of a round, as t.
        batch: Images in a forward.
        threads: Of torch on the CPU.
        device: In words.
        dtype: Of weights and activations.
        peak_mib: The most memory that a forward took beside the weights, by execution; the largest over the levels.
        packed_mib: Weights that compact execution keeps beside the stored ones: packed by rank, and recent slices.
        memory_method: What was counted.
    """

    static_ms: float
    dense_ms: float
    compact_ms: float
    ratio: float
    interval: tuple[float, float]
    dense_ratio: float
    repetitions: int
    compiled: bool
    graphs: bool
    timesteps: list[float]
    batch: int
    threads: int
    device: str
    dtype: str
    peak_mib: dict[str, float]
    packed_mib: float
    memory_method: str


@torch.no_grad()
def measure_latency(
    model: DynamicModel,
    objective: Objective,
    clean: Tensor,
    condition: Any,
    *,
    repetitions: int,
    compile: bool = False,  # noqa: A002
    graphs: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyReport:
    """Time a model on one batch of samples, noised at several levels.

    Args:
        model: In eval mode, on its device. Its execution is the same afterwards; a plan that it had is gone.
        objective: Of its family; gives the levels and the noising.
        clean: (B, *sample_shape) samples.
        condition: Of each.
        repetitions: Rounds, an order reversed every other one.
        compile: Whether time is that of compiled blocks; memory is always that of eager ones.
        graphs: Whether time is that of steps recorded as CUDA graphs; likewise.
        dtype: To run in.
        seed: Of the noise.
        on_progress: Told how many passes over the levels, of how many, are done.
    """
    if model.dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    device = model.device
    levels = _levels(objective, clean.to(device), condition.to(device), seed)
    before = model.execution_options
    schedule = [float(level.timestep[0]) for level in levels]
    sides: dict[str, Callable[..., object]] = {
        "static": partial(model.denoise, executor=StaticExecutor(), gating=CompleteGating()),
        "dense": partial(model.denoise, executor=DenseExecutor()),
        "compact": model.denoise,
    }
    done, total = 0, 1 + len(sides) * (1 + int(graphs) + repetitions)

    def sweep(side: str) -> None:
        nonlocal done
        for level in levels:
            sides[side](*level)
        _synchronize(device)
        done += 1
        on_progress(done, total)

    def pack() -> None:
        # By way of static, so that the executor is new and what it packs is counted.
        model.set_execution("static").plan(schedule)
        sweep("compact")

    packed = measure_memory(pack, device).retained
    peaks = {name: max(_peak(run, level, device) for level in levels) for name, run in sides.items()}
    if compile or graphs:
        model.set_execution("static").set_execution("compact", compile, graphs=graphs).plan(schedule)
        baseline = CompiledStaticExecutor() if compile else model.make_step_runner("static", True, None)
        sides["static"] = partial(model.denoise, executor=baseline, gating=CompleteGating())
    if graphs:
        # What was seen once is recorded when it comes again, which is to be over when time is measured.
        for name in sides:
            sweep(name)
    seconds = interleaved({name: partial(sweep, name) for name in sides}, repetitions, time.perf_counter)
    model.set_execution("static").set_execution(**before)
    compact = paired_ratio(seconds["compact"], seconds["static"], seed)
    return LatencyReport(
        **{f"{name}_ms": _median(seconds[name]) / len(levels) * 1000 for name in sides},
        ratio=compact.ratio,
        interval=(compact.low, compact.high),
        dense_ratio=paired_ratio(seconds["dense"], seconds["static"], seed).ratio,
        repetitions=repetitions,
        compiled=compile,
        graphs=graphs,
        timesteps=[float(level.timestep[0]) for level in levels],
        batch=len(clean),
        threads=torch.get_num_threads(),
        device=device_description(device),
        dtype=str(dtype).removeprefix("torch."),
        peak_mib={name: peak / MEBI for name, peak in peaks.items()},
        packed_mib=packed / MEBI,
        memory_method=MEMORY_METHODS.get(device.type, MEMORY_METHODS["cpu"]),
    )


class Level(NamedTuple):
    """The inputs of one forward."""

    hidden_states: Tensor
    timestep: Tensor
    condition: Any


def _levels(objective: Objective, clean: Tensor, condition: Any, seed: int) -> list[Level]:
    """The noisiest first."""
    noise = normal(seed, tuple(clean.shape), "latency_noise").to(clean.device)
    grid = objective.grid(LEVELS)
    noisiest_first = grid[objective.noise_level(grid).argsort(descending=True)]
    times = [torch.full((len(clean),), float(t), device=clean.device) for t in noisiest_first]
    return [Level(objective.noised(clean, noise, t), t, condition) for t in times]


def _peak(run: Callable[..., object], level: Level, device: torch.device) -> int:
    return measure_memory(partial(run, *level), device).peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
