"""Time whole sampling runs, everything included: the plan, guidance, the sampler's arithmetic, noise."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from dydit_cli.benchmarking.baseline import DiffusersStatic
from dydit_cli.benchmarking.compiling import Acceleration
from dydit_cli.benchmarking.contest import Contest
from dydit_cli.benchmarking.forwards import title_of, words_of
from dydit_cli.benchmarking.masks import Case
from dydit_cli.benchmarking.report import Row, row_of
from dydit_cli.benchmarking.subjects import Subject
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import macs_of, router_macs
from dydit_cli.sampling.generate import Batch, generate


@torch.no_grad()
def time_runs(
    subject: Subject,
    case: Case | None,
    batch: int,
    contest: Contest,
    *,
    steps: int,
    guidance: float,
    diffusers: DiffusersStatic | None,
    acceleration: Acceleration,
    dense: bool,
    seed: int,
) -> Row:
    """One row: a round makes ``batch`` images on every side, from the same noise."""
    subject.impose(case, batch)
    model = subject.model
    models: dict[str, Any] = {"static": twin_of(model, "static")}
    if diffusers is not None:
        models["diffusers"] = diffusers
    if dense:
        models["dense"] = twin_of(model, "dense")
    models["compact"] = twin_of(model, "compact", acceleration.token_capacity)
    models |= acceleration.models(model)
    sides = {
        name: partial(sample_batch, each, batch=batch, steps=steps, guidance=guidance, seed=seed)
        for name, each in models.items()
    }
    ratio = float(sides["compact"]().ratios.mean())
    seconds = contest.run(title_of(case, batch, subject), sides)
    return row_of(
        seconds,
        ideal=trajectory_ideal(model.geometry, ratio),
        seed=seed,
        case=words_of(case, subject),
        batch=batch,
        steps=steps,
        heads=None,
        groups=None,
        tokens=None,
        ratio=ratio,
        difference_to_dense=None,
    )


def twin_of(model: DynamicModel, execution: str, token_capacity: float | None = None) -> DynamicModel:
    """A model of the same weights that runs in its own way, with its own packed weights and plan."""
    # By way of static, so that the executor is new in any case.
    return copy.copy(model).set_execution("static").set_execution(execution, token_capacity=token_capacity)


def sample_batch(model: Any, *, batch: int, steps: int, guidance: float, seed: int) -> Batch:
    """Make ``batch`` images as one batch."""
    (made,) = generate(model, num_images=batch, batch_size=batch, steps=steps, guidance=guidance, seed=seed)
    return made


def trajectory_ideal(geometry: Geometry, ratio: float) -> float:
    """All MACs of a trajectory over the static model's, given its mean executed share of attention and MLP.

    Embeddings, modulation, final layer and routers are the same at every step. LayerNorm is left out.
    """
    static = macs_of(geometry)
    routers = geometry.depth * router_macs(geometry)
    rest = static.total_without_layernorm - static.routed
    return (static.routed * ratio + rest + routers) / static.total_without_layernorm
