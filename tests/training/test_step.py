"""The parts of a step: schedule, average, draws, loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dydit_cli.data import Batch
from dydit_cli.dynamic.gates import CompleteGating, RoutingNoise
from dydit_cli.execution import DenseExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.objectives import objective_for
from dydit_cli.training.average import MovingAverage
from dydit_cli.training.optimiser import make_optimiser
from dydit_cli.training.schedule import target_at
from dydit_cli.training.step import Denoiser, NoisyBatch, StepLoss, draw, global_mean, step_loss
from tests.objectives.base_models import tiny_model


def batch_of(count: int = 8) -> Batch:
    clean = torch.linspace(-1, 1, count * 64).reshape(count, 1, 8, 8)
    return Batch(clean, torch.arange(count) % 3, tuple(range(count)))


def drawn(model: DynamicTransformer, *, step: int = 0, dropout: float = 0.0, count: int = 8) -> NoisyBatch:
    return draw(
        batch_of(count),
        objective_for(model.family),
        model.geometry,
        seed=0,
        step=step,
        label_dropout=dropout,
        device=torch.device("cpu"),
    )


def loss_of(model: DynamicTransformer, noisy: NoisyBatch, **changes: object) -> StepLoss:
    arguments = {
        "dynamic": True,
        "complete_branch": False,
        "temperature": 5.0,
        "target": 0.5,
        "ratio_weight": 1.0,
        "reduce_mean": lambda value: value,
    } | changes
    return step_loss(Denoiser(model), objective_for(model.family), model.geometry, noisy, **arguments)  # type: ignore[arg-type]


def undecided(model: DynamicTransformer) -> DynamicTransformer:
    """Put every router near even odds, so that masks differ from sample to sample."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_router." in name and name.endswith("bias"):
                parameter.zero_()
    return model


def test_target_schedule() -> None:
    targets = [target_at(step, 0.5, full_width_steps=2, ramp_steps=4) for step in range(8)]
    assert targets == [1.0, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert target_at(0, 0.3, full_width_steps=0, ramp_steps=0) == 0.3


def test_average_follows_with_a_warm_start_and_includes_routers() -> None:
    model = tiny_model()
    average = MovingAverage(model, decay=0.5)
    assert [round(average.decay_at(step), 4) for step in (0, 1, 100)] == [0.1, 0.1818, 0.5]
    router = "blocks.0.head_router.linear.bias"
    before = model.state_dict()[router].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(model, 0)
    torch.testing.assert_close(average.model.state_dict()[router], before + 0.9)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_draws_are_named_by_seed_step_and_global_index() -> None:
    model = tiny_model()
    first, again, later = drawn(model), drawn(model), drawn(model, step=1)
    part = draw(
        Batch(batch_of().clean[4:], batch_of().condition[4:], (4, 5, 6, 7)),
        objective_for("dit"),
        model.geometry,
        seed=0,
        step=0,
        label_dropout=0.0,
        device=torch.device("cpu"),
    )
    for name in ("noise", "t", "noisy"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(later, name))
        assert torch.equal(getattr(first, name)[4:], getattr(part, name)), "whatever process holds the sample"
    assert (first.t * 4 / 1000).floor().tolist() == [0, 1, 2, 3] * 2
    assert torch.equal(first.routing_noise.tokens[4:], part.routing_noise.tokens)


def test_label_dropout_uses_the_null_class() -> None:
    model = tiny_model()
    labels = torch.cat([drawn(model, step=step, dropout=0.25).condition for step in range(50)])
    share = float((labels == 3).float().mean())
    assert 0.18 < share < 0.32
    assert torch.equal(drawn(model, dropout=0.0).condition, batch_of().condition)
    assert drawn(model, dropout=1.0).condition.tolist() == [3] * 8


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_gradients_reach_every_router_and_every_weight(family: str) -> None:
    model = undecided(tiny_model(family))
    loss_of(model, drawn(model)).total.backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_routers_move_from_the_start_with_the_papers_temperature() -> None:
    """At a bias of 15 a temperature of 1 leaves no gradient to speak of; 5 does."""

    def largest(temperature: float) -> float:
        model = tiny_model()
        loss_of(model, drawn(model), temperature=temperature, target=0.0).total.backward()
        return max(
            float(parameter.grad.abs().max())
            for parameter in model.router_parameters()
            if parameter.grad is not None
        )

    assert largest(5.0) > 1e-3
    assert largest(1.0) < 1e-4


def test_loss_is_denoising_plus_weighted_squared_distance_of_the_mean() -> None:
    model = undecided(tiny_model())
    noisy = drawn(model)
    loss = loss_of(model, noisy, target=0.9, ratio_weight=2.0)
    assert 0.0 < float(loss.ratio) < 0.9
    assert float(loss.terms["ratio_loss"]) == pytest.approx((float(loss.ratio) - 0.9) ** 2, rel=1e-5)
    expected = float(loss.terms["denoising"]) + 2 * float(loss.terms["ratio_loss"])
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)


def test_complete_branch_adds_the_static_loss_of_the_same_noisy_batch() -> None:
    model = undecided(tiny_model())
    noisy = drawn(model)
    both = loss_of(model, noisy, complete_branch=True)
    alone = loss_of(model, noisy)
    control = loss_of(model, noisy, dynamic=False, target=1.0)
    assert torch.equal(both.terms["complete"], control.terms["denoising"])
    assert both.total.item() == pytest.approx(alone.total.item() + control.total.item(), rel=1e-6)
    with torch.no_grad():
        dense, _ = model.denoise(
            noisy.noisy, noisy.t, noisy.condition, executor=DenseExecutor(), gating=CompleteGating()
        )
    static = objective_for("dit").losses(dense, noisy.clean, noisy.noise, noisy.t)["loss"].mean()
    assert torch.equal(static, control.terms["denoising"])
    assert float(control.ratio) == 1.0
    assert float(control.terms["ratio_loss"]) == 0.0


def test_global_mean_gives_the_gradient_of_the_global_loss() -> None:
    """Two processes whose gradients DDP averages must get the gradient of the one loss on the whole batch."""
    halves = [torch.tensor([0.2, 0.4], requires_grad=True), torch.tensor([0.9, 0.7], requires_grad=True)]
    mean = torch.cat([half.detach() for half in halves]).mean()
    for half in halves:
        (global_mean(half.mean(), lambda _: mean) - 0.5).pow(2).backward()
    whole = torch.cat([half.detach() for half in halves]).requires_grad_()
    (whole.mean() - 0.5).pow(2).backward()
    gradients: list[Tensor] = [half.grad / 2 for half in halves if half.grad is not None]
    torch.testing.assert_close(torch.cat(gradients), whole.grad)


def test_gradient_checkpointing_replays_the_same_masks() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = undecided(tiny_model())
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss_of(model, drawn(model)).total.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for plain, replayed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, replayed)


def test_routers_have_their_own_learning_rate_and_frozen_ones_no_group() -> None:
    model = tiny_model()
    optimiser = make_optimiser(model, learning_rate=1e-4, router_learning_rate=1e-3, weight_decay=0.0)
    rates = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        expected = None if name == "pos_embed" else 1e-3 if "_router." in name else 1e-4
        assert rates.get(id(parameter)) == expected, name
    for parameter in model.router_parameters():
        parameter.requires_grad_(False)
    frozen = make_optimiser(model, learning_rate=1e-4, router_learning_rate=1e-3, weight_decay=0.0)
    assert [group["lr"] for group in frozen.param_groups] == [1e-4]


def test_routing_noise_is_handed_in_not_drawn_inside() -> None:
    model = undecided(tiny_model())
    noisy = drawn(model)
    state = torch.get_rng_state()
    assert torch.equal(loss_of(model, noisy).ratio, loss_of(model, noisy).ratio)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(noisy.routing_noise, RoutingNoise)
    assert not list(Path().iterdir()), "a step writes nothing"
