"""What is executed, by noise level and block."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.families.family import Family
from dydit_cli.flops import macs_of, router_macs
from dydit_cli.objectives import HeldOutDraws, measure, objective_for
from dydit_cli.profiling.shares import measure_shares
from tests.profiling.sources import source_for
from tests.tiny import each_trained_family, tiny_model


def draws(
    model, samples: int = 12, timesteps: int = 4, batch_size: int = 2, images: int = 1000
) -> HeldOutDraws:
    source = source_for(model, samples)
    return HeldOutDraws(source, objective_for(model.family), images, timesteps, batch_size=batch_size)


@each_trained_family
def test_the_means_are_the_ratio_that_targets_refer_to(family: Family) -> None:
    model = tiny_model(family)
    drawn = draws(model)
    executed, expected = measure_shares(model, drawn), measure(model, drawn)
    assert executed.ratio == pytest.approx(expected.ratio, rel=1e-6)
    assert 0.2 < executed.ratio < 0.9
    assert executed.images == expected.images == 12
    for ours, theirs in zip(executed.timesteps, expected.per_timestep, strict=True):
        assert (ours.t, ours.noise_level) == (theirs.t, theirs.noise_level)
        for name in ("ratio", "heads", "groups", "tokens"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6)


def test_blocks_are_those_of_the_routers() -> None:
    model = tiny_model()
    executed = measure_shares(model, draws(model))
    widths = model.routing(torch.tensor(executed.blocks.t))
    assert torch.allclose(torch.tensor(executed.blocks.heads), widths.heads.mean(dim=2))
    assert torch.allclose(torch.tensor(executed.blocks.groups), widths.groups.mean(dim=2))
    assert len({tuple(row) for row in executed.blocks.heads}) > 1
    tokens = torch.tensor(executed.blocks.tokens)
    assert tokens.shape == (4, model.geometry.depth)
    assert float(tokens.mean()) == pytest.approx(sum(row.tokens for row in executed.timesteps) / 4)


def test_gmacs_weigh_every_image_alike_whatever_the_batches() -> None:
    model = tiny_model()
    uneven = measure_shares(model, draws(model, samples=20, batch_size=3))
    whole = measure_shares(model, draws(model, samples=20, batch_size=100))
    assert uneven.gmacs == pytest.approx(whole.gmacs, rel=1e-6)
    assert uneven.gmacs - uneven.gmacs_without_layernorm > 0


def test_gmacs_are_the_ratio_and_what_does_not_change() -> None:
    model = tiny_model()
    executed, static = measure_shares(model, draws(model)), macs_of(model.geometry)
    fixed = (
        static.total_without_layernorm - static.routed + model.geometry.depth * router_macs(model.geometry)
    )
    assert executed.gmacs_without_layernorm * 1e9 == pytest.approx(
        executed.ratio * static.routed + fixed, rel=1e-6
    )


def test_static_execution_executes_everything_and_no_router() -> None:
    model = tiny_model().set_execution("static")
    executed = measure_shares(model, draws(model))
    assert executed.ratio == 1
    assert executed.gmacs * 1e9 == pytest.approx(macs_of(model.geometry).total)
    assert executed.blocks.tokens == [[1.0] * 3] * 4


@pytest.mark.parametrize(("samples", "images", "passes"), [(3, 1000, 9), (12, 5, 10), (12, 12, 12)])
def test_every_timestep_is_seen_even_by_few_samples(samples: int, images: int, passes: int) -> None:
    model = tiny_model()
    told: list[tuple[int, int]] = []
    drawn = draws(model, samples=samples, timesteps=7, images=images)
    executed = measure_shares(model, drawn, lambda done, total: told.append((done, total)))
    assert len(executed.timesteps) == 7
    assert told[-1] == (passes, passes)


def test_timesteps_weigh_alike_where_images_do_not_divide_by_their_number() -> None:
    model = tiny_model()
    drawn = draws(model, samples=10)
    executed, expected = measure_shares(model, drawn), measure(model, drawn)
    assert len(executed.timesteps) == 4
    mean = sum(step.ratio for step in executed.timesteps) / 4
    assert executed.ratio == pytest.approx(mean, rel=1e-9)
    assert expected.ratio == pytest.approx(mean, rel=1e-6)
