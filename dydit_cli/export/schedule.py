"""The timesteps of a baked schedule: those at which the scheduler of the folder asks, and those of `dydit sample`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dydit_cli.dynamic.baked import distinct_timesteps
from dydit_cli.errors import DyditError
from dydit_cli.export.pipeline import pipeline_model, scheduler_for
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from dydit_cli.families.registry import family_of
from dydit_cli.objectives.schedules import timesteps_of

STEPS = 50
"""What diffusers' pipelines and `dydit sample` take if nobody says otherwise."""


@dataclass(frozen=True)
class Schedule:
    """Timesteps that are known before sampling.

    Attributes:
        steps: Sampling steps.
        sampler: Name of the sampler of `dydit sample`.
        by_name: Timesteps in the family's own convention, by what asks for them.
    """

    steps: int
    sampler: str
    by_name: dict[str, list[float]]

    @property
    def timesteps(self) -> list[float]:
        """All of them, each once."""
        return distinct_timesteps(self.by_name)


def schedule_of(model: DynamicTransformer, steps: int | None, sampler: str | None) -> Schedule:
    """The timesteps at which a run asks a model, in a stock pipeline and in `dydit sample`.

    Args:
        model: In either convention.
        steps: Sampling steps; 50 by default.
        sampler: As `dydit sample` names it; the family's first by default.

    Raises:
        DyditError: If they are not known before, or do not fit.
    """
    family, count = family_of(model), STEPS if steps is None else steps
    name, times = timesteps_of(family.objective, sampler, count)
    by_name = {
        f"{scheduler_name(family)} in this folder": pipeline_times(model, family, count),
        f"dydit sample --sampler {name}": [float(t) for t in times.tolist()],
    }
    return Schedule(count, name, by_name)


def scheduler_name(family: Family) -> str:
    """Name of the scheduler in a family's folder."""
    return type(scheduler_for(family.objective)).__name__


def pipeline_times(model: DynamicTransformer, family: Family, steps: int) -> list[float]:
    """Where the scheduler of a family's folder asks, in the family's own convention.

    Raises:
        DyditError: If it would ask twice at one timestep.
    """
    scheduler = scheduler_for(family.objective)
    scheduler.set_timesteps(steps)
    given = torch.as_tensor(scheduler.timesteps)
    if len(given.unique()) != len(given):
        raise DyditError(
            f"{steps} steps are too many for the scheduler of the folder.",
            why=f"{type(scheduler).__name__} asks at whole numbers, and would ask twice at one of them.",
            fix="Pass fewer with --steps; 50 is the default.",
        )
    return [float(t) for t in pipeline_model(model).native_timestep(given).tolist()]
