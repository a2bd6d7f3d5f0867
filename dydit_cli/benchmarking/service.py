"""What a service would see: seconds an image and their spread, the start, memory, and images a minute; static beside compact."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.artifacts.manifest import device_description, versions
from dydit_cli.benchmarking.compiling import Acceleration
from dydit_cli.benchmarking.contest import Contest, Estimate, Progress, synchronize, threads_of
from dydit_cli.benchmarking.runs import sample_batch, twin_of
from dydit_cli.benchmarking.settings import BenchSettings
from dydit_cli.benchmarking.subjects import Inputs, Subject, open_subject, static_config
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.profiling.memory import measure_memory
from dydit_cli.sampling.samplers import sampler_for

MEBI = 2**20

STEPS = 50

MEDIAN, SLOW = 0.5, 0.95


@dataclass(frozen=True)
class ColdStart:
    """Seconds before the first image can begin; libraries are loaded already, files are in the system's cache.

    Attributes:
        load: Reading the model from its folder; None for a preset.
        plan: Preparing the schedule; 0 for static.
        pack: What the first forward takes longer than a later one: weights are packed, memory is taken from the system.
        compile: What it takes longer still when compiled; None if not compiled.
        total: Their sum.
    """

    load: float | None
    plan: float
    pack: float
    compile: float | None
    total: float


@dataclass(frozen=True)
class ServiceRow:
    """Requests of one batch size in one execution.

    Attributes:
        execution: ``static``, ``compact``, ``compiled_static``, ``compiled``, ``graphed_static`` or ``graphed``.
        batch: Images of a request.
        steps: Of the sampler.
        p50_s, p95_s: Seconds an image: those of a request over its images; median and 95th percentile over requests.
        images_per_minute: Over all requests.
        requests: How many.
        ratio: Executed share of attention and MLP MACs, mean over all images.
        peak_mib: The most memory at once: weights, what is packed, and what a sampling run takes; None for compiled and graphed.
    """

    execution: str
    batch: int
    steps: int
    p50_s: float
    p95_s: float
    images_per_minute: float
    requests: int
    ratio: float
    peak_mib: float | None


@dataclass(frozen=True)
class ServiceReport:
    """All rows, the start of each execution, and what they were measured on; see `BenchReport`."""

    rows: list[ServiceRow]
    cold_start: dict[str, ColdStart]
    title: str
    note: str
    model: dict[str, Any]
    weights_mib: float
    clock: str
    threads: int
    device: str
    dtype: str
    versions: dict[str, str]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def serve(
    settings: BenchSettings,
    device: torch.device | str = "cpu",
    *,
    on_progress: Progress = lambda what, done, total: None,
    on_estimate: Estimate = lambda seconds: None,
) -> ServiceReport:
    """Answer requests of each batch size in turn, static and compact; wall time.

    Args:
        settings: What and how; ``pairs`` is the number of requests, ``steps`` None means 50. The first case of masks counts.
        device: Where.
        on_progress: Told what is measured, and how many requests of how many are done.
        on_estimate: Told once how many seconds the requests will take.

    Raises:
        DyditError: For a model, preset or mask that cannot be.
    """
    device = torch.device(device)
    steps = settings.steps or STEPS
    settings.check_device(device)
    acceleration = Acceleration(settings.compile, settings.graphs, settings.token_capacity)
    with threads_of(settings.threads):
        on_progress("building the model", 0, 1)
        subject = open_subject(settings, device)
        subject.impose(subject.cases[0], max(settings.batch))
        on_progress("cold start", 0, 1)
        start = dict(_cold_starts(subject, settings, steps))
        contest = Contest("wall", device, settings.pairs, list(settings.batch), on_progress, on_estimate)
        rows = [
            row
            for batch in settings.batch
            for row in _requests(subject, settings, steps, batch, contest, acceleration)
        ]
        model = subject.model
        return ServiceReport(
            rows=rows,
            cold_start=start,
            title=subject.title,
            note=subject.note,
            model=static_config(model),
            weights_mib=_weights(model) / MEBI,
            clock="wall",
            threads=torch.get_num_threads(),
            device=device_description(device),
            dtype=settings.dtype,
            versions=versions(),
            settings=asdict(settings) | {"steps": steps},
        )


class _Requests:
    """Answers one request after the other, each for other images."""

    def __init__(self, model: DynamicModel, batch: int, steps: int, guidance: float, seed: int) -> None:
        self._model = model
        self._options = {"batch": batch, "steps": steps, "guidance": guidance}
        self._next = seed
        self.ratios: list[float] = []

    def __call__(self) -> None:
        made = sample_batch(self._model, seed=self._next, **self._options)  # type: ignore[arg-type]
        self._next += 1
        self.ratios += made.ratios.tolist()


def _requests(
    subject: Subject,
    settings: BenchSettings,
    steps: int,
    batch: int,
    contest: Contest,
    acceleration: Acceleration,
) -> Iterator[ServiceRow]:
    models = {
        "static": twin_of(subject.model, "static"),
        "compact": twin_of(subject.model, "compact", settings.token_capacity),
    }
    memory = {name: _peak(model, batch, steps, settings) for name, model in models.items()}
    models |= acceleration.models(subject.model)
    sides = {
        name: _Requests(model, batch, steps, settings.guidance, settings.seed)
        for name, model in models.items()
    }
    for name, seconds in contest.run(f"requests of {batch}", sides).items():
        an_image = torch.tensor(seconds, dtype=torch.float64) / batch
        yield ServiceRow(
            execution=name,
            batch=batch,
            steps=steps,
            p50_s=float(an_image.quantile(MEDIAN)),
            p95_s=float(an_image.quantile(SLOW)),
            images_per_minute=60 / float(an_image.mean()),
            requests=len(seconds),
            ratio=sum(sides[name].ratios) / len(sides[name].ratios),
            peak_mib=memory.get(name),
        )


def _peak(model: DynamicModel, batch: int, steps: int, settings: BenchSettings) -> float:
    """MiB of weights and of a sampling run that begins with nothing packed, which is when most is held."""
    use = measure_memory(
        lambda: sample_batch(model, batch=batch, steps=steps, guidance=settings.guidance, seed=settings.seed),
        model.device,
    )
    return (_weights(model) + use.peak) / MEBI


def _weights(model: DynamicModel) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def _cold_starts(subject: Subject, settings: BenchSettings, steps: int) -> Iterator[tuple[str, ColdStart]]:
    """Start each execution once, from the folder where there is one."""
    inputs = subject.inputs(settings.batch[0])[0]
    sampler = sampler_for(family_of(subject.model).objective)
    times = sampler.times_at(steps, inputs.hidden_states.shape)
    schedule = torch.empty(0) if times is None else times
    for execution, compiled_name in (("static", "compiled_static"), ("compact", "compiled")):
        load, model = _loaded(subject, settings)
        model.set_execution("static").set_execution(execution)
        plan = _planning(model, schedule, inputs)
        pack = _first(model, inputs)
        yield execution, _start(load, plan, pack, None)
        if settings.compile:
            compiled = Acceleration(compile=True).models(model)[compiled_name]
            plan = _planning(compiled, schedule, inputs)
            first = _first(compiled, inputs)
            yield compiled_name, _start(load, plan, pack, max(0.0, first - pack))


def _start(load: float | None, plan: float, pack: float, compiling: float | None) -> ColdStart:
    return ColdStart(load, plan, pack, compiling, (load or 0.0) + plan + pack + (compiling or 0.0))


def _loaded(subject: Subject, settings: BenchSettings) -> tuple[float | None, DynamicModel]:
    """A model as it comes from its folder, and the seconds that took; a preset has no folder."""
    if subject.folder is None:
        return None, copy.copy(subject.model)
    started = time.perf_counter()
    model = load_model(
        subject.folder, torch_dtype=settings.number_type, device=subject.model.device, convention="native"
    )
    synchronize(model.device)
    return time.perf_counter() - started, model


def _planning(model: DynamicModel, schedule: Tensor, inputs: Inputs) -> float:
    """Seconds of preparing a schedule; static execution has nothing to prepare."""
    if model.execution == "static":
        return 0.0
    return _seconds(lambda: model.plan(schedule, inputs.class_labels), model)


def _first(model: DynamicModel, inputs: Inputs) -> float:
    """Seconds by which a first forward exceeds a later one."""
    first, later = (_seconds(lambda: model(*inputs), model) for _ in range(2))
    return max(0.0, first - later)


def _seconds(run: Callable[[], object], model: DynamicModel) -> float:
    started = time.perf_counter()
    run()
    synchronize(model.device)
    return time.perf_counter() - started
