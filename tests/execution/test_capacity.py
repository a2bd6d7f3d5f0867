"""Token selection with static shapes gives what gathering gives, also where there is too little room."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dydit_cli
from dydit_cli.dynamic.gates import Gating, ImposedGating, ThresholdGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.execution.capacity import CapacityExecutor, Overflow, capacity_of, select_rows
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from tests.execution.backbones import each_backbone
from tests.tiny import (
    random_routing,
    relative_difference,
    tiny_inputs,
    tiny_model,
    uniform_routing,
)

BATCH, TOKENS = 3, 16
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@torch.no_grad()
def run(model: DynamicTransformer, executor: CompactExecutor, gating: Gating) -> tuple[Tensor, Routing]:
    return model.denoise(*tiny_inputs(model, BATCH), executor=executor, gating=gating)


def imposed(model: DynamicTransformer, tokens: int) -> ImposedGating:
    return ImposedGating(uniform_routing(model.geometry, BATCH, heads=3, groups=4, tokens=tokens))


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [1, 5, 20, 40])
def test_selection_is_a_stable_partition(seed: int, capacity: int) -> None:
    keep = torch.rand(40, generator=torch.Generator().manual_seed(seed)) < (0.0, 0.3, 0.7, 1.1)[seed]
    found = select_rows(keep, capacity)
    kept = keep.nonzero().squeeze(1).tolist()
    others = (~keep).nonzero().squeeze(1).tolist()
    assert found.rows.tolist() == (kept + others)[:capacity]
    assert found.valid.tolist() == ([True] * len(kept) + [False] * len(others))[:capacity]
    assert bool(found.overflow) == (len(kept) > capacity)


def test_capacity_is_rounded_up_to_what_there_is() -> None:
    assert [capacity_of(share, 48) for share in (0.01, 0.5, 0.51, 0.99, 1.0)] == [8, 24, 32, 48, 48]
    assert capacity_of(0.5, 3) == 3


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(DyditError, match="not possible"):
        CapacityExecutor(share)


# ------------------------------------------------------------------ a whole model

CASES = {
    "none kept": (0.5, 0, 0),
    "one kept": (0.5, 1, 0),
    "as many as there is room for": (0.5, 8, 0),
    "one too many": (0.5, 9, 1),
    "all kept, half the room": (0.5, TOKENS, 1),
    "all kept, all the room": (1.0, TOKENS, 0),
    "hardly any room": (0.01, 4, 1),
}


@each_backbone
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("case", list(CASES))
def test_it_gives_what_gathering_gives(family: Family, dtype: torch.dtype, case: str) -> None:
    share, tokens, repeated = CASES[case]
    model = tiny_model(family).to(dtype)
    tokens = tokens * model.geometry.num_tokens // TOKENS
    gating, executor = imposed(model, tokens), CapacityExecutor(share)
    expected, _ = run(model, CompactExecutor(), gating)
    found, record = run(model, executor, gating)
    assert relative_difference(found, expected) < TOLERANCES[dtype]
    assert executor.overflows == repeated
    assert int(record.tokens.sum()) == BATCH * model.geometry.depth * tokens


@each_backbone
@pytest.mark.parametrize("seed", range(3))
def test_widths_that_differ_in_a_batch(family: Family, seed: int) -> None:
    model = tiny_model(family)
    gating = ImposedGating(random_routing(model.geometry, BATCH, seed))
    with torch.no_grad():
        dense, _ = model.denoise(*tiny_inputs(model, BATCH), executor=DenseExecutor(), gating=gating)
    for share in (0.3, 0.9):
        executor = CapacityExecutor(share)
        found, _ = run(model, executor, gating)
        assert relative_difference(found, dense) < 1e-5


@each_backbone
def test_live_decisions(family: Family) -> None:
    model, executor = tiny_model(family), CapacityExecutor(0.8)
    for bias in (0.0, 0.5, -0.5, float("inf")):
        expected, first = run(model, CompactExecutor(), ThresholdGating(bias))
        found, second = run(model, executor, ThresholdGating(bias))
        assert torch.equal(first.tokens, second.tokens)
        assert relative_difference(found, expected) < 1e-5


def test_without_the_check_an_overflow_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag says that something is missing, and something is: else the tests above would show nothing."""
    model = tiny_model()
    gating, executor = imposed(model, 12), CapacityExecutor(0.5)
    expected, _ = run(model, CompactExecutor(), gating)
    flags: list[list[Tensor]] = []

    def unseen(overflow: Overflow) -> bool:
        flags.append(overflow.flags)
        return False

    monkeypatch.setattr(Overflow, "happened", unseen)
    found, _ = run(model, executor, gating)
    assert [bool(flag) for flag in flags[0]] == [True] * model.geometry.depth
    assert relative_difference(found, expected) > 1e-3


def test_room_for_all_moves_no_token() -> None:
    """And no flag is left to wait for."""
    model, executor = tiny_model(), CapacityExecutor(1.0)
    gating = imposed(model, 12)
    with TorchOperations() as operations:
        run(model, executor, gating)
    assert not {"index_copy", "scatter_", "cumsum", "nonzero"} & set(operations.names)


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_tokens_that_are_not_kept_cannot_spoil_others(share: float) -> None:
    """Room that is left is filled with tokens that are not kept; what their update would be does not matter."""
    model = tiny_model()
    gating, executor = imposed(model, 4), CapacityExecutor(share)
    with torch.no_grad():
        # The second half of the MLP makes infinities of any row; only the choice keeps them out.
        for block in model.blocks:
            block.mlp.fc2.bias.fill_(float("inf"))
    expected, _ = run(model, CompactExecutor(), gating)
    found, _ = run(model, executor, gating)
    assert torch.equal(torch.isfinite(found), torch.isfinite(expected))


class TorchOperations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> Counter[str]:
        """Those after which the host must know a value on the device, or a shape that depends on one."""
        waiting = ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero")
        return Counter(name for name in self.names if name in waiting)


def test_no_block_asks_the_device() -> None:
    """Of one forward at a planned timestep, nothing but the check of the weights and the flags' reading waits."""
    model = tiny_model().requires_grad_(False)
    waits = {}
    for name, executor in (("gather", CompactExecutor()), ("capacity", CapacityExecutor(0.8))):
        model._executor = executor
        images, times, labels = tiny_inputs(model)
        model.plan(times, labels)
        with torch.no_grad():
            model(images, times[0], labels)
            with TorchOperations() as operations:
                model(images, times[0], labels)
        waits[name] = operations.waits
    assert waits["gather"]["nonzero"] == model.geometry.depth
    assert waits["capacity"]["nonzero"] == 0
    # One more than gathering has besides: the flags, read once.
    assert waits["capacity"].total() == waits["gather"].total() - model.geometry.depth + 1


def test_two_threads_do_not_mix_their_flags() -> None:
    """One overflows and one does not, at the same time on one executor."""
    model, executor = tiny_model(), CapacityExecutor(0.5)
    gatings = [imposed(model, 4), imposed(model, 12)]
    expected = [run(model, CompactExecutor(), gating)[0] for gating in gatings]
    found: list[Tensor | None] = [None, None]
    start = Barrier(2)

    def work(which: int) -> None:
        start.wait()
        for _ in range(3):
            found[which] = run(model, executor, gatings[which])[0]

    threads = [Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert executor.overflows == 3
    for output, reference in zip(found, expected, strict=True):
        assert output is not None
        assert relative_difference(output, reference) < 1e-5


# ------------------------------------------------------------------ the option


@torch.no_grad()
def test_the_option_of_a_model() -> None:
    model = tiny_model().requires_grad_(False).set_execution("compact")
    images, times, labels = tiny_inputs(model)
    expected = model(images, times[0], labels).sample
    model.set_execution("compact", token_capacity=0.9)
    executor = model._executor
    assert isinstance(executor, CapacityExecutor)
    assert executor.share == 0.9
    assert model.execution_options == {
        "name": "compact",
        "compile": False,
        "graphs": False,
        "token_capacity": 0.9,
    }
    assert model.set_execution(**model.execution_options)._executor is executor
    plan = model.plan(times, labels)
    assert model._executor is executor
    assert relative_difference(model(images, times[0], labels).sample, expected) < 1e-5
    assert plan.hits == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.execution_options == model.execution_options
        assert other._executor is not executor
        assert relative_difference(other(images, times[0], labels).sample, expected) < 1e-5
    assert model.set_execution("compact").execution_options["token_capacity"] is None
    assert type(model._executor) is CompactExecutor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "static", "token_capacity": 0.5}, "static execution"),
        ({"name": "dense", "token_capacity": 0.5}, "dense execution"),
        (
            {"name": "compact", "token_capacity": 0.5, "compile": True},
            "Compiling does not go with a token capacity",
        ),
        ({"name": "compact", "token_capacity": 1.5}, "not possible"),
    ],
)
def test_what_does_not_go_together_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DyditError, match=message):
        tiny_model().set_execution(**options)


@torch.no_grad()
def test_load_model_with_a_capacity(tmp_path: Any) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    loaded = dydit_cli.load_model(tmp_path / "m", token_capacity=0.8)
    assert loaded.execution_options["token_capacity"] == 0.8
    images, times, labels = tiny_inputs(model)
    expected = model.set_execution("compact")(images, times[0], labels).sample
    assert relative_difference(loaded(images, times[0], labels).sample, expected) < 1e-5
