"""The benchmark: open the subject, time every row, say what it was measured on."""

from __future__ import annotations

from dataclasses import asdict

import torch

from dydit_cli.artifacts.manifest import device_description, versions
from dydit_cli.benchmarking.baseline import diffusers_baseline
from dydit_cli.benchmarking.compiling import Acceleration
from dydit_cli.benchmarking.contest import Contest, Estimate, Progress, threads_of
from dydit_cli.benchmarking.forwards import time_forwards
from dydit_cli.benchmarking.report import BenchReport, Row
from dydit_cli.benchmarking.runs import time_runs
from dydit_cli.benchmarking.settings import BenchSettings
from dydit_cli.benchmarking.subjects import open_subject, static_config


def bench(
    settings: BenchSettings,
    device: torch.device | str = "cpu",
    *,
    on_progress: Progress = lambda what, done, total: None,
    on_estimate: Estimate = lambda seconds: None,
) -> BenchReport:
    """Measure what compact execution saves in time, against what it saves in arithmetic.

    Args:
        settings: What and how.
        device: Where.
        on_progress: Told what is measured, and how many runs of how many are done.
        on_estimate: Told once how many seconds all of it will take.

    Raises:
        DyditError: For a model, preset, mask or clock that cannot be.
    """
    device = torch.device(device)
    clock = settings.clock_name(device)
    settings.check_device(device)
    with threads_of(settings.threads):
        on_progress("building the model", 0, 1)
        subject = open_subject(settings, device)
        model = subject.model
        diffusers = diffusers_baseline(model, settings.seed)
        acceleration = Acceleration(settings.compile, settings.graphs, settings.token_capacity)
        grid = [(case, batch) for case in subject.cases for batch in settings.batch]
        contest = Contest(
            clock, device, settings.pairs, [batch for _, batch in grid], on_progress, on_estimate
        )
        rows: list[Row] = []
        for case, batch in grid:
            if settings.steps is None:
                row = time_forwards(
                    subject,
                    case,
                    batch,
                    contest,
                    diffusers=diffusers,
                    acceleration=acceleration,
                    dense=settings.dense,
                    seed=settings.seed,
                )
            else:
                row = time_runs(
                    subject,
                    case,
                    batch,
                    contest,
                    steps=settings.steps,
                    guidance=settings.guidance,
                    diffusers=diffusers,
                    acceleration=acceleration,
                    dense=settings.dense,
                    seed=settings.seed,
                )
            rows.append(row)
        return BenchReport(
            rows=rows,
            title=subject.title,
            note=subject.note,
            model=static_config(model),
            clock=clock,
            threads=torch.get_num_threads(),
            device=device_description(device),
            dtype=settings.dtype,
            versions=versions(),
            settings=asdict(settings),
        )
