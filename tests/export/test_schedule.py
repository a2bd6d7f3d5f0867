"""The timesteps that are baked are those at which samplers ask."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.errors import DyditError
from dydit_cli.export.schedule import schedule_of
from dydit_cli.objectives.schedules import SCHEDULES, timesteps_of
from dydit_cli.sampling.samplers import SAMPLERS, sampler_for
from tests.tiny import tiny_model


def test_every_sampler_whose_times_are_known_is_there_with_its_times() -> None:
    for objective, known in SCHEDULES.items():
        assert next(iter(known)) == sampler_for(objective).name
        fixed = {each.name: each.times for each in SAMPLERS if each.objective == objective and each.times}
        assert fixed.keys() == known.keys()
        for name, times in fixed.items():
            assert times is not None
            assert torch.equal(timesteps_of(objective, name, 7)[1], times(7))


def test_the_schedule_of_a_family() -> None:
    dit, sit = schedule_of(tiny_model("dit"), 4, None), schedule_of(tiny_model("sit"), 4, "heun")
    assert dit.by_name == {
        "DDIMScheduler in this folder": [999, 749, 499, 249],
        "dydit sample --sampler ddpm": [999, 666, 333, 0],
    }
    assert dit.timesteps == [999, 749, 666, 499, 333, 249, 0]
    in_folder, sampled = sit.by_name.values()
    assert sampled == [0, 0.25, 0.5, 0.75, 1]
    # The flow scheduler of a pipeline counts in whole numbers, from 999 to 0 with data at 0.
    assert in_folder == pytest.approx([1 - t / 1000 for t in (999, 749, 500, 250)], abs=1e-3)
    assert (schedule_of(tiny_model("dit"), None, None).steps, len(in_folder)) == (50, 4)


@pytest.mark.parametrize(
    ("objective", "sampler", "steps"),
    [("diffusion", "dpm++", 1000), ("diffusion", None, 1001), ("flow", "sde", 1), ("flow", "ddpm", 5)],
)
def test_what_cannot_be_baked(objective: str, sampler: str | None, steps: int) -> None:
    with pytest.raises(DyditError):
        timesteps_of(objective, sampler, steps)
