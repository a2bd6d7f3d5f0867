"""What users of the Python classes rely on: the keywords, shapes and errors of a forward, routing, plans and copies."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dydit_cli.dynamic.gates import ImposedGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import EXECUTIONS, CompactExecutor
from dydit_cli.families.family import Family
from dydit_cli.families.registry import FAMILIES, class_named, family_named, family_of
from tests.tiny import (
    bits,
    each_family,
    each_labelled_family,
    flipped,
    predict,
    random_routing,
    relative_difference,
    tiny_inputs,
    tiny_model,
)


@each_labelled_family
@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_forward_has_the_keywords_of_diffusers(family: Family, execution: str) -> None:
    model = tiny_model(family).set_execution(execution)
    images, times, labels = tiny_inputs(model)
    output = model(hidden_states=images, timestep=times, class_labels=labels)
    (sample,) = model(hidden_states=images, timestep=times, class_labels=labels, return_dict=False)
    assert torch.equal(bits(output.sample), bits(sample))
    *frames, _, height, width = images.shape
    assert sample.shape == (*frames, model.config["out_channels"], height, width)
    assert model.execution == execution


@each_labelled_family
@torch.no_grad()
def test_labels_beyond_the_classes_mean_the_null_class(family: Family) -> None:
    """Stock pipelines send 1000 whatever the number of classes."""
    model = tiny_model(family)
    images, times, _ = tiny_inputs(model)
    null = model(images, times, torch.tensor([10, 10, 10])).sample
    assert torch.equal(model(images, times, torch.tensor([1000, 11, 10])).sample, null)
    assert torch.equal(model(images, times).sample, null)
    assert not torch.equal(model(images, times, torch.tensor([9, 9, 9])).sample, null)


@each_family
@torch.no_grad()
def test_a_timestep_may_be_a_number_a_scalar_or_one_for_all(family: Family) -> None:
    model = tiny_model(family)
    images, _, labels = tiny_inputs(model)
    expected = predict(model, images, torch.full((3,), 0.5), labels)
    for timestep in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)):
        assert torch.equal(bits(predict(model, images, timestep, labels)), bits(expected))


@each_family
@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 8, 8), (4, 8), (8, 8), (4, 8, 4), (1, 4, 8, 8)])
def test_a_wrong_size_is_explained(family: Family, shape: tuple[int, ...]) -> None:
    model = tiny_model(family)
    if model.geometry.with_tokens(1) is not model.geometry:
        pytest.skip(f"{family.title} takes samples of any size")
    expected = model.geometry.sample_shape
    # What stands before the image is right, so that each shape is wrong in one respect.
    shape = (3, *expected[:-3], *shape)
    with pytest.raises(DyditError, match=f"expects inputs of {'x'.join(map(str, expected))}") as error:
        predict(model, torch.zeros(shape), 0.5, tiny_inputs(model)[2])
    assert error.value.why
    assert error.value.fix


@each_family
def test_an_unknown_execution_is_explained(family: Family) -> None:
    with pytest.raises(DyditError, match="did you mean 'compact'"):
        tiny_model(family).set_execution("compct")


@each_family
def test_a_dial_that_is_no_number_is_refused(family: Family) -> None:
    """It would switch everything off without a word."""
    with pytest.raises(DyditError, match="keep_bias"):
        tiny_model(family).set_keep_bias(float("nan"))


@each_family
@torch.no_grad()
def test_widths_depend_on_the_timestep_alone(family: Family) -> None:
    model = tiny_model(family)
    images, times, labels = tiny_inputs(model)
    _, first = model.denoise(images, times, labels)
    _, second = model.denoise(images.flip(0) * 3, times, flipped(labels))
    assert torch.equal(first.heads, second.heads)
    assert torch.equal(first.groups, second.groups)
    assert not torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.heads[0], first.heads[1])


@each_family
@torch.no_grad()
def test_routing_says_what_a_forward_decides(family: Family) -> None:
    model = tiny_model(family).set_execution("compact").set_keep_bias(0.3)
    images, times, labels = tiny_inputs(model)
    _, decided = model.denoise(images, times, labels)
    told = model.routing(times, images, labels)
    assert torch.equal(told.heads, decided.heads)
    assert torch.equal(told.groups, decided.groups)
    assert torch.equal(told.tokens, decided.tokens)
    widths = model.routing(times)
    assert torch.equal(widths.heads, decided.heads)
    assert widths.tokens.all()
    assert widths.tokens.shape == decided.tokens.shape
    assert model.routing(float(times[0])).heads.shape == (1, model.geometry.depth, 6)
    assert model.set_execution("static").routing(times).heads.all()
    assert model.routing(times, images, labels).tokens.all()


@each_family
@torch.no_grad()
def test_a_plan_changes_nothing_and_counts_its_use(family: Family) -> None:
    """Up to rounding: units may be added up in another order. Mixed timesteps count as known if each of them is."""
    model = tiny_model(family).set_execution("compact")
    images, times, labels = tiny_inputs(model)
    before = [predict(model, images, t, labels) for t in times]
    plan = model.plan(times)
    after = [predict(model, images, t, labels) for t in times]
    assert all(relative_difference(one, other) < 1e-5 for one, other in zip(after, before, strict=True))
    assert (plan.hits, plan.misses) == (3, 0)
    predict(model, images, times[0] + 0.0625, labels)
    assert (plan.hits, plan.misses) == (3, 1)
    together = predict(model, images, times, labels)
    assert (plan.hits, plan.misses) == (4, 1)
    alone = torch.cat([sample[row : row + 1] for row, sample in enumerate(before)])
    assert relative_difference(together, alone) < 1e-5


def first_weight(block: nn.Module) -> torch.Tensor:
    """A weight that every forward reads."""
    return next(layer.weight for layer in block.modules() if isinstance(layer, nn.Linear))


@each_family
def test_a_copy_is_independent(family: Family) -> None:
    model = tiny_model(family).set_execution("compact").set_keep_bias(0.1)
    arguments = tiny_inputs(model)
    with torch.no_grad():
        expected = predict(model, *arguments)
        other = copy.deepcopy(model)
        assert other.execution == "compact"
        assert other.keep_bias == 0.1
        assert torch.equal(bits(predict(other, *arguments)), bits(expected))
        first_weight(other.dynamic_blocks[0]).mul_(2)
        assert not torch.equal(predict(other, *arguments), expected)
        assert torch.equal(bits(predict(model, *arguments)), bits(expected))


@each_family
@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_a_model_can_be_pickled(family: Family, execution: str) -> None:
    """Worker processes get models so; what compact execution packed stays behind."""
    model = tiny_model(family).set_execution(execution).set_keep_bias(0.1)
    arguments = tiny_inputs(model)
    expected = predict(model, *arguments)
    other = pickle.loads(pickle.dumps(model))
    assert other.execution == execution
    assert torch.equal(bits(predict(other, *arguments)), bits(expected))


@each_family
@torch.no_grad()
def test_threads_that_share_a_model_get_the_single_thread_result(family: Family) -> None:
    """Different timesteps, masks and conditions at once, with a slice store too small for all of them."""
    model, executor = tiny_model(family), CompactExecutor(slice_budget=0.3)
    jobs = [(tiny_inputs(model, 2, seed), random_routing(model.geometry, 2, seed)) for seed in range(6)] * 4

    def run(job: tuple[tuple[torch.Tensor, ...], object]) -> torch.Tensor:
        arguments, routing = job
        with torch.no_grad():
            imposed, _ = model.denoise(*arguments, executor=executor, gating=ImposedGating(routing))
            live, _ = model.denoise(*arguments, executor=executor)
        return torch.cat([imposed, live])

    expected = [run(job) for job in jobs]
    executor = CompactExecutor(slice_budget=0.3)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(run, jobs))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(bits(one), bits(other))


@each_family
def test_gradients_reach_the_input_in_compact_execution(family: Family) -> None:
    """Guidance by a gradient of the input needs them; weights packed under inference mode must not forbid them."""
    model = tiny_model(family).requires_grad_(False).set_execution("compact")
    images, times, labels = tiny_inputs(model)
    with torch.inference_mode():
        predict(model, images, times, labels)
    images.requires_grad_()
    predict(model, images, times, labels).square().sum().backward()
    compact, images.grad = images.grad, None
    predict(model.set_execution("dense"), images, times, labels).square().sum().backward()
    assert relative_difference(compact, images.grad) < 1e-4


@each_family
@torch.no_grad()
def test_compact_agrees_with_dense_under_autocast(family: Family) -> None:
    model = tiny_model(family)
    arguments, routing = tiny_inputs(model), random_routing(model.geometry, 3)
    with torch.autocast("cpu", torch.bfloat16):
        dense, _ = model.denoise(*arguments, gating=ImposedGating(routing))
        compact, _ = model.denoise(*arguments, executor=CompactExecutor(), gating=ImposedGating(routing))
    assert relative_difference(compact, dense) < 2e-2


@each_family
@torch.no_grad()
def test_an_empty_batch_passes(family: Family) -> None:
    model = tiny_model(family)
    images, times, labels = (part[:0] for part in tiny_inputs(model))
    for execution in EXECUTIONS:
        assert predict(model.set_execution(execution), images, times, labels).shape[0] == 0


@each_family
def test_the_registry_knows_the_family(family: Family) -> None:
    model = tiny_model(family)
    assert family_of(model) is family
    assert family_named(family.name) is family
    assert class_named(type(model).__name__) is family.model_class
    assert class_named(family.pipeline_class.__name__) is family.pipeline_class
    assert family.reference_url.startswith("https://")
    assert sum(other.name == family.name for other in FAMILIES) == 1
