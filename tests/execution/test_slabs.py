"""Packing by rank, views for prefixes, and a cache that stays within its budget."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, current_thread

import pytest
import torch

from dydit_cli.dynamic.gates import ImposedGating
from dydit_cli.dynamic.layers import DynamicAttention, DynamicMlp
from dydit_cli.execution import CompactExecutor, slabs
from dydit_cli.execution.slabs import SlabStore
from dydit_cli.execution.units import pack
from tests.tiny import random_routing, tiny_inputs, tiny_model


@pytest.fixture
def attention() -> DynamicAttention:
    return tiny_model().blocks[0].attn.requires_grad_(False)


@pytest.fixture
def mlp() -> DynamicMlp:
    return tiny_model(num_groups=4).blocks[0].mlp.requires_grad_(False)


def test_attention_is_packed_by_rank(attention: DynamicAttention) -> None:
    packed = pack(attention)
    assert packed.entry.shape == (6, 24, 48)
    assert packed.leave.shape == (6, 8, 48)
    for rank, head in enumerate(attention.head_order.tolist()):
        rows = torch.cat([torch.arange(8) + part * 48 + head * 8 for part in range(3)])
        assert torch.equal(packed.entry[rank], attention.qkv.weight[rows])
        assert torch.equal(packed.entry_bias[rank], attention.qkv.bias[rows])
        assert torch.equal(packed.leave[rank], attention.proj.weight[:, head * 8 : head * 8 + 8].T)


def test_the_mlp_is_packed_by_group(mlp: DynamicMlp) -> None:
    packed = pack(mlp)
    assert packed.entry.shape == packed.leave.shape == (4, 48, 48)
    for group in range(4):
        channels = mlp.channel_order[group * 48 : group * 48 + 48]
        assert torch.equal(packed.entry[group], mlp.fc1.weight[channels])
        assert torch.equal(packed.entry_bias[group], mlp.fc1.bias[channels])
        assert torch.equal(packed.leave[group], mlp.fc2.weight[:, channels].T)


def test_a_prefix_is_a_view(attention: DynamicAttention) -> None:
    store = SlabStore()
    whole = store.slice(attention, (0, 1, 2, 3, 4, 5))
    for units in range(7):
        part = store.slice(attention, tuple(range(units)))
        assert part.units == units
        assert part.entry.shape == (units * 24, 48)
        assert part.leave.shape == (units * 8, 48)
        if units:
            assert part.entry.data_ptr() == whole.entry.data_ptr()
    assert store.slice_bytes == 0


def test_a_gathered_slice_is_kept_and_given_again(mlp: DynamicMlp) -> None:
    store = SlabStore()
    first = store.slice(mlp, (0, 2))
    assert store.slice(mlp, (0, 2)) is first
    packed = pack(mlp)
    assert torch.equal(first.entry, torch.cat([packed.entry[0], packed.entry[2]]))
    assert torch.equal(first.entry_bias, torch.cat([packed.entry_bias[0], packed.entry_bias[2]]))
    assert torch.equal(first.leave, torch.cat([packed.leave[0], packed.leave[2]]))


@pytest.mark.parametrize("budget", [0.0, 0.4, 1.0, 2.5])
def test_slices_stay_within_the_budget(attention: DynamicAttention, mlp: DynamicMlp, budget: float) -> None:
    """All masks of both layers; the last slice alone may exceed a budget that is smaller than one slice."""
    store, largest = SlabStore(budget), 0
    packed = pack(attention).nbytes + pack(mlp).nbytes
    for layer, units in ((attention, 6), (mlp, 4), (attention, 6)):
        for count in range(1, units):
            for active in itertools.combinations(range(units), count):
                largest = max(largest, store.slice(layer, active).nbytes)
                assert store.slice_bytes <= max(budget * packed, largest)
    assert store.packed_bytes == packed + store.slice_bytes


def test_the_least_recently_used_slice_goes_first(attention: DynamicAttention) -> None:
    store = SlabStore(budget=1.0)
    first, second = store.slice(attention, (0, 2, 4)), store.slice(attention, (1, 3, 5))
    assert store.slice(attention, (0, 2, 4)) is first
    store.slice(attention, (0, 1, 3))
    assert store.slice(attention, (0, 2, 4)) is first
    assert store.slice(attention, (1, 3, 5)) is not second


def test_an_edit_drops_the_slices_of_its_layer_alone(attention: DynamicAttention, mlp: DynamicMlp) -> None:
    store = SlabStore()
    old, kept = store.slice(attention, (1, 3)), store.slice(mlp, (0, 2))
    attention.qkv.weight.mul_(2)
    new = store.slice(attention, (1, 3))
    assert torch.equal(new.entry, old.entry * 2)
    assert store.slice(mlp, (0, 2)) is kept
    assert store.slice_bytes == new.nbytes + kept.nbytes


def test_threads_pack_once(attention: DynamicAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that need a layer at the same moment wait for one packing, and get the weights that they asked for."""
    masks = [active for count in range(1, 6) for active in itertools.combinations(range(6), count)]
    expected = {active: SlabStore().slice(attention, active).entry.clone() for active in masks}
    packings: list[str] = []

    def slow(layer: DynamicAttention) -> slabs.Slabs:
        packings.append(current_thread().name)
        time.sleep(0.02)
        return pack(layer)

    monkeypatch.setattr(slabs, "pack", slow)
    store, start = SlabStore(budget=0.5), Barrier(4)

    def run(offset: int) -> bool:
        start.wait()
        order = masks[offset:] + masks[:offset]
        return all(torch.equal(store.slice(attention, active).entry, expected[active]) for active in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(0, 40, 10)))
    assert len(packings) == 1
    assert store.packed_bytes - store.slice_bytes == pack(attention).nbytes


@torch.no_grad()
def test_a_long_run_of_masks_keeps_memory_bounded() -> None:
    model, executor = tiny_model(), CompactExecutor(slice_budget=1.0)
    weights = sum(pack(block.attn).nbytes + pack(block.mlp).nbytes for block in model.blocks)
    for seed in range(20):
        gating = ImposedGating(random_routing(model.geometry, 3, seed))
        model.denoise(*tiny_inputs(model), executor=executor, gating=gating)
    assert weights < executor.packed_bytes <= 2 * weights
