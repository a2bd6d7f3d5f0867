"""Which weights of a schedule are views, copies or swapped: the choice, its bytes, and that results do not depend on it."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dydit_cli.dynamic.layers import DynamicAttention
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.execution.policies import LayerSchedule, arrange, best_chain, nested, swap_orders
from dydit_cli.execution.slabs import SlabStore
from dydit_cli.execution.units import pack
from dydit_cli.families.backbone import DynamicTransformer
from tests.tiny import bits, relative_difference, tiny_inputs, tiny_model

TRIPLES = list(itertools.combinations(range(6), 3))
TIMES = [float(t) for t in range(990, 0, -30)]


@pytest.fixture
def attention() -> DynamicAttention:
    return tiny_model().blocks[0].attn.requires_grad_(False)


def weights_of(attention: DynamicAttention, active: tuple[int, ...]) -> torch.Tensor:
    """What a slice computes, whatever the order of its units: the sum of each unit's rows times its columns."""
    packed, ranks = pack(attention), list(active)
    return torch.einsum("uri,urj->uij", packed.entry[ranks][:, -8:], packed.leave[ranks]).sum(0)


def computed(part: object, units: int) -> torch.Tensor:
    entry, leave = part.entry.view(units, 24, 48), part.leave.view(units, 8, 48)
    return torch.einsum("uri,urj->uij", entry[:, -8:], leave).sum(0)


def test_nested_masks_have_an_order() -> None:
    order = nested([(0, 3), (0, 1, 3, 5), (3,), (0, 3)], 6)
    assert order == (3, 0, 1, 5, 2, 4)
    assert nested([(0, 1), (0, 2)], 6) is None
    assert nested([(0, 1), (0, 1, 2), ()], 4) == (0, 1, 2, 3)


def test_the_best_chain_is_the_most_used() -> None:
    masks = [(0,), (0, 1), (0, 2), (0, 2), (0, 1, 2), (1, 3)]
    assert best_chain(masks) == [(0,), (0, 2), (0, 1, 2)]


def test_swaps_move_only_what_changes_sides() -> None:
    targets, moved = swap_orders([(0, 1, 2), (0, 1, 3), (0, 1, 3), (1, 3, 5)], 6)
    assert targets[0, 1, 3] == (0, 1, 3, 2, 4, 5)
    assert targets[1, 3, 5] == (5, 1, 3, 2, 4, 0)
    assert moved == 4


def test_the_budget_decides() -> None:
    steady = LayerSchedule(6, 100, ((0, 1), (0, 1, 2), (0, 1)))
    slow = LayerSchedule(6, 100, tuple(itertools.combinations(range(6), 5)))
    wild = LayerSchedule(6, 100, tuple(TRIPLES))

    def policies(budget: float, may_swap: bool = True) -> list[str]:
        return [found.policy for found in arrange([steady, slow, wild], budget, may_swap)]

    assert policies(1e9) == ["prefix", "cache", "cache"]
    assert policies(2500) == ["prefix", "cache", "gather"]
    assert policies(2499) == ["prefix", "swap", "gather"]
    assert policies(0, may_swap=False) == ["prefix", "gather", "gather"]


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0, 10.0])
def test_every_policy_gives_the_weights_asked_for(attention: DynamicAttention, budget: float) -> None:
    store = SlabStore(budget)
    policies = store.arrange([(attention, TRIPLES)])
    assert policies.total() == 1
    # The schedule twice, then backwards, then masks that it does not name.
    others = [(0,), (2, 4), (0, 1, 2, 3, 4, 5), ()]
    for active in [*TRIPLES, *TRIPLES, *TRIPLES[::-1], *others, *TRIPLES[:3]]:
        if active in TRIPLES:
            store.at(TRIPLES.index(active))
        with torch.no_grad(), store.leased(attention, active) as part:
            assert part.units == len(active)
            torch.testing.assert_close(computed(part, len(active)), weights_of(attention, active))
        assert store.slice_bytes <= budget * pack(attention).nbytes


def test_nested_masks_copy_nothing_once_they_lie_in_order(attention: DynamicAttention) -> None:
    store, masks = SlabStore(), [(0, 2), (0, 2, 5), (0, 2, 3, 5), (0, 2, 5)]
    assert store.arrange([(attention, masks)]) == {"prefix": 1}
    before = store.copied_bytes
    for active in masks * 5:
        part = store.ready(attention, active)
        torch.testing.assert_close(computed(part, len(active)), weights_of(attention, active))
    assert store.copied_bytes == before
    assert store.slice_bytes == 0


def test_prefixes_of_the_ranks_never_copy(attention: DynamicAttention) -> None:
    """Ordered width: the slabs lie as they were packed."""
    store = SlabStore()
    store.arrange([(attention, [tuple(range(units)) for units in (6, 4, 2, 3)])])
    for units in (6, 4, 2, 3, 1, 0):
        store.ready(attention, tuple(range(units)))
    assert store.copied_bytes == store.slice_bytes == 0


def test_what_is_needed_last_goes_first(attention: DynamicAttention) -> None:
    """A cycle of three masks with room for two: the least recently used would always be the one that is needed next."""
    masks = [(0, 1, 4), (0, 2, 5), (1, 3, 5)]
    store = SlabStore(budget=1.0)
    store.arrange([(attention, masks)])
    store._packed[id(attention)].targets = {}
    store._moving.clear()
    unit = pack(attention).nbytes // 6
    for _ in range(2):
        for step, active in enumerate(masks):
            store.at(step)
            store.ready(attention, active)
    before = store.copied_bytes
    for _ in range(4):
        for step, active in enumerate(masks):
            store.at(step)
            store.ready(attention, active)
    # At most one mask a cycle is copied again, where the least recently used would be all three.
    assert store.copied_bytes - before <= 4 * 3 * unit


@pytest.mark.parametrize("budget", [0.0, 0.2, 1.0])
@torch.no_grad()
def test_a_planned_model_agrees_with_dense_and_keeps_to_the_budget(budget: float) -> None:
    model = tiny_model()
    model._executor = CompactExecutor(slice_budget=budget)
    plan = model.plan(TIMES)
    images, _, labels = tiny_inputs(model)
    slabs = model._executor._store.slab_bytes
    for t in [*TIMES, *TIMES[::3], TIMES[0]]:
        dense, _ = model.denoise(images, t, labels, executor=DenseExecutor())
        assert relative_difference(model(images, t, labels).sample, dense) < 1e-5
        assert model._executor.packed_bytes <= (1 + budget) * slabs
    assert plan.misses == 0
    assert plan.policies.total() == 6


@torch.no_grad()
def test_memory_does_not_grow_with_the_steps() -> None:
    sizes = []
    for steps in (10, 100, 400):
        model = tiny_model().set_execution("compact")
        times = torch.linspace(999, 0, steps).tolist()
        model.plan(times)
        images, _, labels = tiny_inputs(model, 1)
        for t in times:
            model(images, t, labels)
        sizes.append(model._executor.packed_bytes / model._executor._store.slab_bytes)
    assert max(sizes) <= 2.0


def test_results_do_not_depend_on_what_ran_before() -> None:
    """Slabs that move lie, at each step, where the schedule says and not where earlier steps left them."""
    model = tiny_model().requires_grad_(False)
    model._executor = CompactExecutor(slice_budget=0.0)
    assert model.plan(TIMES).policies["swap"] > 0
    first = run(model, TIMES)
    backwards = run(model, TIMES[::-1])[::-1]
    for one, other in zip(first, backwards, strict=True):
        assert torch.equal(bits(one), bits(other))


@torch.no_grad()
def run(model: DynamicTransformer, times: list[float]) -> list[torch.Tensor]:
    images, _, labels = tiny_inputs(model)
    return [model(images, t, labels).sample for t in times]


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_threads_share_a_planned_model(budget: float) -> None:
    model = tiny_model().requires_grad_(False)
    model._executor = CompactExecutor(slice_budget=budget)
    model.plan(TIMES)
    expected = dict(zip(TIMES, run(model, TIMES), strict=True))
    orders = [TIMES, TIMES[::-1], TIMES[10:] + TIMES[:10], TIMES[::2] + TIMES[1::2]]
    with ThreadPoolExecutor(4) as pool:
        for order, samples in zip(orders, pool.map(lambda times: run(model, times), orders), strict=True):
            assert all(
                torch.equal(bits(sample), bits(expected[t])) for t, sample in zip(order, samples, strict=True)
            )


def test_a_gradient_outlives_the_lease() -> None:
    """Weights that autograd keeps for the way back must not move meanwhile."""
    model = tiny_model().requires_grad_(False)
    model._executor = CompactExecutor(slice_budget=0.0)
    model.plan(TIMES)
    images, _, labels = tiny_inputs(model)
    images.requires_grad_()
    output = model(images, TIMES[0], labels).sample.square().sum()
    run(model, TIMES[1:5])
    output.backward()
    compact, images.grad = images.grad, None
    model.set_execution("dense")(images, TIMES[0], labels).sample.square().sum().backward()
    assert relative_difference(compact, images.grad) < 1e-4
