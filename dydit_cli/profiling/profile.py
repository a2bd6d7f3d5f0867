"""Profile a model: what it executes, what that costs, and what it takes on this machine.

One call, one report. The parts stand in files of their own: `shares` (decisions), `counting` (multiply-accumulates), `latency` (time
and memory), `token_maps` (where tokens are kept), `plots` (pictures of them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dydit_cli.artifacts.manifest import versions
from dydit_cli.data.conditions import conditions_of
from dydit_cli.dynamic.baked import fixed_widths
from dydit_cli.dynamic.gates import ThresholdGating
from dydit_cli.execution import CompactExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.flops import macs_of, ratio_floor, router_macs
from dydit_cli.objectives import HeldOutDraws, Objective, objective_of
from dydit_cli.profiling.counting import CountedMacs, count_compact, count_static
from dydit_cli.profiling.inputs import Inputs
from dydit_cli.profiling.latency import LatencyReport, measure_latency
from dydit_cli.profiling.shares import GIGA, BlockShares, Executed, TimestepShares, measure_shares
from dydit_cli.randomness import normal

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""

JSON_PARTS = 1e6
"""JSON keeps six decimals of GMACs: single multiply-accumulates of the smallest models."""


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure.

    Attributes:
        images: Held-out samples, at most.
        timesteps: Evenly spaced.
        batch_size: Samples of a forward while shares are measured.
        latency: Whether to measure time and memory.
        latency_batch: Samples of a forward of that.
        repetitions: Rounds of that.
        compile: Whether blocks of static and compact execution are compiled for the time of that.
        graphs: Whether steps of static and compact execution are recorded as CUDA graphs for the time of that.
        dtype: Type of numbers of that.
        seed: Of every draw.
    """

    images: int = 1000
    timesteps: int = 50
    batch_size: int = 64
    latency: bool = True
    latency_batch: int = 4
    repetitions: int = 11
    compile: bool = False
    graphs: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all, of the routers, and of the static model."""

    total: int
    routers: int
    static: int


@dataclass(frozen=True)
class CountedGmacs:
    """One pass counted by formula and by two public counters, in GMACs an image; see `dydit_cli.profiling.counting`.

    Attributes:
        formula, fvcore: LayerNorm included.
        formula_without_layernorm, torch: Without it.
        deviation: The larger relative deviation of a counter from its formula.
        agrees: Whether that is within 0.1 %.
        t: Timestep whose decisions were counted; None for the static model.
        timed: Whether the weights follow the timestep (TD-LoRA), which the formula leaves out.
    """

    formula: float
    fvcore: float
    formula_without_layernorm: float
    torch: float
    deviation: float
    agrees: bool
    t: float | None
    timed: bool = False

    @classmethod
    def of(cls, counted: CountedMacs, t: float | None = None) -> CountedGmacs:
        """Turn MACs into GMACs."""
        return cls(
            formula=counted.formula / GIGA,
            fvcore=counted.fvcore / GIGA,
            formula_without_layernorm=counted.formula_without_layernorm / GIGA,
            torch=counted.torch / GIGA,
            deviation=counted.deviation,
            agrees=counted.agrees,
            t=t,
            timed=counted.timed,
        )


@dataclass(frozen=True)
class ProfileReport:
    """What a model executes and costs. GMACs are of one image's forward pass, and are what the papers call GFLOPs.

    Attributes:
        gmacs: Executed, mean over images and timesteps; LayerNorm and routers included.
        gmacs_without_layernorm: The same without LayerNorm.
        static_gmacs: Of the complete model without routers, LayerNorm included.
        static_gmacs_without_layernorm: The same without LayerNorm.
        router_gmacs: Of all routers; part of ``gmacs`` unless the complete model was profiled.
        ratio: Executed share of the attention and MLP MACs: what targets refer to.
        total_ratio: ``gmacs / static_gmacs``: everything, routers included.
        trajectory_ratio: ``ratio`` on a sampler's own states, schedule and guidance; None if it was not measured.
        floor: The least ``ratio`` that training can reach.
        params: Numbers of parameters.
        timesteps: Decisions by timestep.
        blocks: Decisions by timestep and block.
        counted: ``static`` and ``compact``: formula against counters.
        latency: Time and memory, or None.
        inputs: What the model saw: ``note``, ``real``, ``data``, ``images``.
        model: Family, geometry and execution.
        settings: As given.
        versions: Of Python and packages.
    """

    gmacs: float
    gmacs_without_layernorm: float
    static_gmacs: float
    static_gmacs_without_layernorm: float
    router_gmacs: float
    ratio: float
    total_ratio: float
    trajectory_ratio: float | None
    floor: float
    params: Parameters
    timesteps: tuple[TimestepShares, ...]
    blocks: BlockShares
    counted: dict[str, CountedGmacs]
    latency: LatencyReport | None
    inputs: dict[str, Any] | None
    model: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def title(self) -> str:
        """The model in a few words, for headings."""
        model = self.model
        return f"{model['title']}, {model['depth']} blocks of {model['hidden_size']} channels, ratio {self.ratio:.2f}"

    def to_json(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return _rounded(asdict(self))


def refuse_baked(model: DynamicModel) -> None:
    """See that a model can be asked at any timestep.

    Raises:
        DyditError: For baked widths.
    """
    if model.config.get("baked") is not None:
        raise fixed_widths("A profile looks at timesteps that are not in their table.")


def profile(
    model: DynamicModel,
    settings: ProfileSettings | None = None,
    *,
    inputs: Inputs | None = None,
    trajectory_ratio: float | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> ProfileReport:
    """Profile a model.

    Args:
        model: In eval mode. In static execution the complete model is profiled, routers excluded.
        settings: What to measure.
        inputs: What the model sees (`find_inputs`); None is allowed for a static model, whose decisions need none.
        trajectory_ratio: Measured elsewhere, by sampling.
        on_progress: Told how far it is.

    Raises:
        ValueError: If a dynamic model comes without inputs.
        DyditError: For baked widths.
    """
    settings = settings or ProfileSettings()
    static = model.execution == "static"
    refuse_baked(model)
    objective = objective_of(model)
    complete = macs_of(model.geometry)
    if inputs is not None:
        draws = HeldOutDraws(
            inputs.source,
            objective,
            settings.images,
            settings.timesteps,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        executed = measure_shares(model, draws, lambda done, total: on_progress("routing", done, total))
    elif static:
        executed = _everything(model, objective, settings.timesteps)
    else:
        raise ValueError("a dynamic model is profiled on inputs; see find_inputs")
    clean, condition = _samples(
        model, inputs, settings.latency_batch if settings.latency else 1, settings.seed
    )
    counted = _counted(model, objective, clean[:1], condition[:1], settings.seed, on_progress)
    latency = None
    if settings.latency:
        latency = measure_latency(
            model,
            objective,
            clean,
            condition,
            repetitions=settings.repetitions,
            compile=settings.compile,
            graphs=settings.graphs,
            dtype=settings.dtype,
            seed=settings.seed,
            on_progress=lambda done, total: on_progress("time and memory", done, total),
        )
    return ProfileReport(
        gmacs=executed.gmacs,
        gmacs_without_layernorm=executed.gmacs_without_layernorm,
        static_gmacs=complete.total / GIGA,
        static_gmacs_without_layernorm=complete.total_without_layernorm / GIGA,
        router_gmacs=model.geometry.depth * router_macs(model.geometry) / GIGA,
        ratio=executed.ratio,
        total_ratio=executed.gmacs * GIGA / complete.total,
        trajectory_ratio=trajectory_ratio,
        floor=ratio_floor(model.geometry),
        params=_parameters(model),
        timesteps=executed.timesteps,
        blocks=executed.blocks,
        counted=counted,
        latency=latency,
        inputs=None
        if inputs is None
        else {"note": inputs.note, "real": inputs.real, "data": inputs.data, "images": executed.images},
        model={
            "family": model.family,
            "title": family_of(model).title,
            "execution": model.execution,
            "keep_bias": model.keep_bias,
            **asdict(model.geometry),
        },
        settings={**asdict(settings), "dtype": str(settings.dtype).removeprefix("torch.")},
        versions=versions(),
    )


def _parameters(model: DynamicModel) -> Parameters:
    total = sum(parameter.numel() for parameter in model.parameters())
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    return Parameters(total, routers, total - routers)


def _everything(model: DynamicModel, objective: Objective, timesteps: int) -> Executed:
    """What the complete model executes, which needs no measuring."""
    complete, depth = macs_of(model.geometry), model.geometry.depth
    grid = objective.grid(timesteps)
    levels = objective.noise_level(grid).tolist()
    rows = [[1.0] * depth for _ in levels]
    gmacs = complete.total / GIGA
    return Executed(
        ratio=1.0,
        gmacs=gmacs,
        gmacs_without_layernorm=complete.total_without_layernorm / GIGA,
        images=0,
        timesteps=tuple(
            TimestepShares(t, level, 1.0, 1.0, 1.0, gmacs, 1.0)
            for t, level in zip(grid.tolist(), levels, strict=True)
        ),
        blocks=BlockShares(grid.tolist(), levels, rows, rows, rows),
    )


def _samples(model: DynamicModel, inputs: Inputs | None, count: int, seed: int) -> tuple[torch.Tensor, Any]:
    """(B, *sample_shape) samples and conditions for counting and timing; repeated where there are fewer, noise where there are none."""
    if inputs is None:
        return model.example_inputs(count, seed)
    chosen = [index % len(inputs.source) for index in range(count)]
    return inputs.source.batch(chosen), conditions_of(inputs.source, chosen)


@torch.no_grad()
def _counted(
    model: DynamicModel,
    objective: Objective,
    clean: torch.Tensor,
    condition: Any,
    seed: int,
    on_progress: Progress,
) -> dict[str, CountedGmacs]:
    """Count the static model, and the compact graph in the middle of the noise levels."""
    static = model.execution == "static"
    total = 1 if static else 2
    on_progress("counting", 0, total)
    # An odd grid has a middle.
    t = objective.grid(3)[1:2]
    noised = objective.noised(clean, normal(seed, tuple(clean.shape), "counting_noise"), t)
    given = (noised.to(model.device), t.to(model.device), condition.to(model.device))
    counted = {"static": CountedGmacs.of(count_static(model, *given))}
    on_progress("counting", 1, total)
    if not static:
        live = ThresholdGating(model.keep_bias)
        _, routing = model.denoise(*given, executor=CompactExecutor(), gating=live)
        counted["compact"] = CountedGmacs.of(count_compact(model, routing, *given), float(t[0]))
        on_progress("counting", 2, total)
    return counted


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # inf is a legal keep_bias, and no number in JSON.
        return round(value * JSON_PARTS) / JSON_PARTS if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
