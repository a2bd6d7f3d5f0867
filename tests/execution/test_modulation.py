"""adaLN tables: what they hold, their budget, and that a forward is the same with them up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dydit_cli.execution import CompactExecutor, DenseExecutor, StaticExecutor
from dydit_cli.families.backbone import DynamicTransformer
from tests.tiny import bits, relative_difference, tiny_inputs, tiny_model

SCHEDULE = [999.0, 500.0, 250.0, 3.0]


@pytest.fixture
def model() -> DynamicTransformer:
    return tiny_model().requires_grad_(False).set_execution("compact")


def multiplications(model: DynamicTransformer, *arguments: object) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*arguments)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("labels", [[0, 5, 10], [10, 10, 2], [3, 3, 3]])
@torch.no_grad()
def test_a_table_changes_nothing_but_rounding(model: DynamicTransformer, labels: list[int]) -> None:
    images, _, _ = tiny_inputs(model)
    plan = model.plan(SCHEDULE, [0, 2, 3, 5, 1000])
    assert plan.modulation is not None
    assert len(plan.modulation) == 4
    for t in SCHEDULE:
        dense, _ = model.denoise(images, t, torch.tensor(labels), executor=DenseExecutor())
        assert relative_difference(model(images, t, torch.tensor(labels)).sample, dense) < 1e-5
    mixed = torch.tensor(SCHEDULE[:3])
    dense, _ = model.denoise(images, mixed, torch.tensor(labels), executor=DenseExecutor())
    assert relative_difference(model(images, mixed, torch.tensor(labels)).sample, dense) < 1e-5
    assert plan.misses == 0


def test_a_table_saves_its_multiplications(model: DynamicTransformer) -> None:
    images, _, _ = tiny_inputs(model)
    labels = torch.arange(3)
    model.plan(SCHEDULE)
    live, other = (multiplications(model, images, 500.0, given) for given in (labels, labels + 5))
    model.plan(SCHEDULE, range(3))
    # Of three samples: adaLN of three blocks and the final layer, and the timestep's embedding.
    assert live - multiplications(model, images, 500.0, labels) == 3 * (20 * 48**2 + 256 * 48 + 48**2)
    assert multiplications(model, images, 500.0, labels + 5) == other


def test_pairs_that_occur_twice_are_computed_once(model: DynamicTransformer) -> None:
    """Under guidance half of a batch has the null class."""
    images, _, _ = tiny_inputs(model)
    model.plan(SCHEDULE)
    distinct = multiplications(model, images, 500.0, torch.tensor([0, 1, 10]))
    shared = multiplications(model, images, 500.0, torch.tensor([0, 10, 1000]))
    tokens_may_differ = 3 * 16 * 2 * 48 * 192 * 3
    assert distinct - shared + tokens_may_differ >= 20 * 48**2


@torch.no_grad()
def test_a_table_keeps_to_its_budget() -> None:
    model = tiny_model()
    width = 20 * 48 * 4
    for budget, steps in ((0, 0), (2 * width - 1, 0), (2 * width, 1), (7 * width, 3), (10**9, 4)):
        model._executor = CompactExecutor(table_budget=budget)
        plan = model.plan(SCHEDULE, [1, 10])
        held = plan.modulation
        assert (0 if held is None else len(held)) == steps
        if held is not None:
            assert held.nbytes == steps * 2 * width
        images, _, _ = tiny_inputs(model, 2)
        for t in SCHEDULE:
            dense, _ = model.denoise(images, t, torch.tensor([1, 10]), executor=DenseExecutor())
            assert relative_difference(model(images, t, torch.tensor([1, 10])).sample, dense) < 1e-5


def edit_adaln(model: DynamicTransformer) -> None:
    model.blocks[1].adaLN_modulation[1].weight.mul_(1.5)


def edit_final(model: DynamicTransformer) -> None:
    model.final_layer.adaLN_modulation[1].bias.add_(0.5)


def edit_labels(model: DynamicTransformer) -> None:
    model.y_embedder.embedding_table.weight.data += 0.5


def fuse_adapter(model: DynamicTransformer) -> None:
    """Through ``.data``, as peft does it: no new version."""
    for block in model.blocks:
        block.adaLN_modulation[1].weight.data *= 1.5


@pytest.mark.parametrize("edit", [edit_adaln, edit_final, edit_labels, fuse_adapter])
@torch.no_grad()
def test_a_table_follows_its_source(model: DynamicTransformer, edit: object) -> None:
    images, _, _ = tiny_inputs(model)
    labels = torch.tensor([1, 2, 10])
    model.plan(SCHEDULE, labels)
    before = model(images, 500.0, labels).sample
    edit(model)
    dense, _ = model.denoise(images, 500.0, labels, executor=DenseExecutor())
    after = model(images, 500.0, labels).sample
    assert relative_difference(after, dense) < 1e-5
    assert not torch.equal(bits(after), bits(before))


@torch.no_grad()
def test_a_table_stands_aside_for_autocast_and_gradients(model: DynamicTransformer) -> None:
    images, _, _ = tiny_inputs(model)
    labels = torch.tensor([1, 2, 10])
    with torch.autocast("cpu", torch.bfloat16):
        live = model(images, 500.0, labels).sample
        model.plan(SCHEDULE, labels)
        planned = model(images, 500.0, labels).sample
    assert relative_difference(planned, live) < 2e-2
    with torch.enable_grad():
        embeddings = model.y_embedder.embedding_table.weight.requires_grad_()
        model(images, 500.0, labels).sample.sum().backward()
    assert embeddings.grad is not None


@torch.no_grad()
def test_other_executions_take_no_table(model: DynamicTransformer) -> None:
    images, _, _ = tiny_inputs(model)
    labels = torch.tensor([1, 2, 10])
    static, _ = model.denoise(images, 500.0, labels, executor=StaticExecutor())
    model.plan(SCHEDULE, labels)
    again, _ = model.denoise(images, 500.0, labels, executor=StaticExecutor())
    assert torch.equal(bits(static), bits(again))
