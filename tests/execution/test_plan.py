"""Plans: the widths of a schedule, decided once, matched by t, and dropped when what they were made from changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dydit_cli.errors import DyditError
from dydit_cli.execution import EXECUTIONS, CompactExecutor, DenseExecutor, StaticExecutor, executor_named
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.registry import SIT
from tests.tiny import bits, relative_difference, tiny_inputs, tiny_model

SCHEDULE = [999.0, 500.0, 250.0, 3.0]


@pytest.fixture
def model() -> DynamicTransformer:
    return tiny_model().requires_grad_(False).set_execution("compact")


@torch.no_grad()
def forward(model: DynamicTransformer, t: float | torch.Tensor) -> torch.Tensor:
    images, _, labels = tiny_inputs(model)
    return model(images, t, labels).sample


def test_a_plan_switches_to_compact() -> None:
    model = tiny_model()
    assert model.execution == "dense"
    model.plan(SCHEDULE)
    assert model.execution == "compact"


@pytest.mark.parametrize(
    "timesteps",
    [
        SCHEDULE,
        [999, 500, 250, 3],
        torch.tensor(SCHEDULE),
        torch.tensor([999, 500, 250, 3]),
        torch.tensor(SCHEDULE).double(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_timesteps_match_by_value(model: DynamicTransformer, timesteps: object, dtype: torch.dtype) -> None:
    plan = model.plan(timesteps)
    for t in SCHEDULE:
        forward(model, torch.full((3,), t, dtype=dtype))
    assert (plan.hits, plan.misses) == (4, 0)


def test_rounded_timesteps_miss(model: DynamicTransformer) -> None:
    """A pipeline that casts its schedule sends other values than the scheduler holds: planned are the values received."""
    plan = model.plan([0.1])
    forward(model, torch.tensor(0.1).bfloat16())
    assert (plan.hits, plan.misses) == (0, 1)
    forward(model, 0.1)
    assert (plan.hits, plan.misses) == (1, 1)


def test_a_new_plan_replaces_the_old(model: DynamicTransformer) -> None:
    old = model.plan(SCHEDULE)
    new = model.plan([100.0])
    forward(model, 100.0)
    forward(model, 999.0)
    assert (old.hits, old.misses) == (0, 0)
    assert (new.hits, new.misses) == (1, 1)


def test_the_dial_of_the_plan(model: DynamicTransformer) -> None:
    """A plan decided with another dial is not used."""
    plan = model.plan(SCHEDULE)
    model.set_keep_bias(float("inf"))
    complete = forward(model, 500.0)
    assert plan.hits == 0
    static = tiny_model().set_execution("static")
    assert relative_difference(complete, forward(static, 500.0)) < 1e-5
    model.set_keep_bias(0.0)
    forward(model, 500.0)
    assert plan.hits == 1


def edit_router(model: DynamicTransformer) -> None:
    model.blocks[1].head_router.linear.bias.neg_()


def edit_channel_router(model: DynamicTransformer) -> None:
    model.blocks[2].channel_router.linear.weight.neg_()


def edit_time_embedder(model: DynamicTransformer) -> None:
    model.t_embedder.mlp[2].weight.neg_()


def load_other(model: DynamicTransformer) -> None:
    model.load_state_dict(tiny_model(seed=9).state_dict())


def load_assigned(model: DynamicTransformer) -> None:
    for seed in (3, 4, 9):
        state = {key: tensor.clone() for key, tensor in tiny_model(seed=seed).state_dict().items()}
        model.load_state_dict(state, assign=True)


EDITS = [edit_router, edit_channel_router, edit_time_embedder, load_other, load_assigned]


@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
@torch.no_grad()
def test_a_plan_follows_its_source(
    model: DynamicTransformer, edit: Callable[[DynamicTransformer], None]
) -> None:
    plan = model.plan(SCHEDULE)
    before = forward(model, 500.0)
    edit(model)
    images, _, labels = tiny_inputs(model)
    dense, _ = model.denoise(images, 500.0, labels, executor=DenseExecutor())
    after = forward(model, 500.0)
    assert relative_difference(after, dense) < 1e-5
    assert not torch.equal(after, before)
    assert plan.hits == 1


@torch.no_grad()
def test_a_tensor_at_a_reused_address_is_another_tensor(model: DynamicTransformer) -> None:
    """Allocators give the address of a freed tensor to its successor, whose version starts again too."""
    bias = model.blocks[1].head_router.linear.bias
    memory = bias.numpy().copy()
    bias.data = torch.from_numpy(memory)
    address, version = bias.data_ptr(), bias._version
    model.plan(SCHEDULE)
    before = forward(model, 500.0)
    memory *= -1
    bias.data = torch.from_numpy(memory)
    assert (bias.data_ptr(), bias._version) == (address, version)
    after = forward(model, 500.0)
    assert not torch.equal(after, before)
    images, _, labels = tiny_inputs(model)
    dense, _ = model.denoise(images, 500.0, labels, executor=DenseExecutor())
    assert relative_difference(after, dense) < 1e-5


def test_a_plan_in_the_convention_of_pipelines(model: DynamicTransformer) -> None:
    """The plan's t is what the forward receives, not what the embedder is given."""
    pipeline = SIT.pipeline_class(**tiny_model("sit").config)
    pipeline.load_state_dict(tiny_model("sit").state_dict())
    pipeline.eval().requires_grad_(False).set_execution("compact")
    live = forward(pipeline, 250.0)
    plan = pipeline.plan([250.0])
    assert torch.equal(bits(forward(pipeline, 250.0)), bits(live))
    assert (plan.hits, plan.misses) == (1, 0)
    native = tiny_model("sit").requires_grad_(False).set_execution("compact")
    assert relative_difference(-forward(native, 0.75), live) < 1e-5


def test_an_empty_plan_misses(model: DynamicTransformer) -> None:
    plan = model.plan([])
    forward(model, 1.0)
    assert (plan.hits, plan.misses) == (0, 1)


def test_names_of_executions() -> None:
    classes = {"dense": DenseExecutor, "compact": CompactExecutor, "static": StaticExecutor}
    for name in EXECUTIONS:
        assert isinstance(executor_named(name), classes[name])
        assert executor_named(name).name == name
    with pytest.raises(DyditError, match="no execution called 'sparse'"):
        executor_named("sparse")
