"""Steps as graphs, recorded by a stand-in on the CPU: what is recorded, what is not, and that results are those of eager execution."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dydit_cli
from dydit_cli.dynamic.gates import CompleteGating, Gating, ImposedGating, ThresholdGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor, DenseExecutor, StaticExecutor, graphs
from dydit_cli.execution.graphs import (
    GraphedCompactExecutor,
    GraphedStaticExecutor,
    StepGraphs,
    room_for,
)
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from tests.execution.backbones import each_backbone
from tests.execution.standin import StandInRecorder
from tests.execution.test_pipelines import draw, pipeline_of
from tests.execution.test_stale_weights import EDITS, Edit
from tests.tiny import random_routing, relative_difference, tiny_inputs, tiny_model

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SCHEDULE = [990.0, 640.0, 320.0, 15.0]


def graphed(
    model: DynamicTransformer, share: float | None = None, gather_from: int = 0, **options: Any
) -> GraphedCompactExecutor:
    """Let ``model`` record its steps; rooms are learned for the smallest batch too."""
    executor = GraphedCompactExecutor(share, recorder_for=StandInRecorder, gather_from=gather_from, **options)
    model.requires_grad_(False)._executor = executor
    return executor


@torch.no_grad()
def forward(model: DynamicTransformer, t: float, seed: int = 1, batch: int = 3) -> Tensor:
    images, _, labels = tiny_inputs(model, batch, seed)
    return model(images, t, labels).sample


@torch.no_grad()
def reference(model: DynamicTransformer, t: float, seed: int = 1, batch: int = 3) -> Tensor:
    images, _, labels = tiny_inputs(model, batch, seed)
    return model.denoise(images, t, labels, executor=CompactExecutor())[0]


# ------------------------------------------------------------------ results


@each_backbone
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("labelled", [False, True], ids=["conditions", "adaLN table"])
@torch.no_grad()
def test_it_gives_what_eager_execution_gives(family: Family, dtype: torch.dtype, labelled: bool) -> None:
    model = tiny_model(family).to(dtype)
    executor = graphed(model)
    images, _, labels = tiny_inputs(model)
    times = SCHEDULE if family.objective == "diffusion" else [t / 1000 for t in SCHEDULE]
    plan = model.plan(times, labels if labelled else None)
    assert (plan.modulation is not None) == labelled
    for run, (recorded, replays) in enumerate([(0, 0), (4, 4), (4, 8), (4, 12)]):
        noisy = images + 0.1 * run
        for t in times:
            expected, decided = model.denoise(noisy, t, labels, executor=CompactExecutor())
            found, record = model.denoise(noisy, t, labels)
            assert relative_difference(found, expected) < TOLERANCES[dtype]
            assert torch.equal(record.heads, decided.heads)
            assert torch.equal(record.groups, decided.groups)
            if dtype == torch.float32:
                assert torch.equal(record.tokens, decided.tokens)
        assert executor.graphs.recorded - executor.overflows <= recorded
        assert executor.graphs.replays == replays
    assert (plan.hits, plan.misses) == (16, 0)


@pytest.mark.parametrize("share", [None, 1.0, 0.6, 0.1])
def test_other_images_and_too_little_room(share: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that was learned from one image is too small for the next: it grows, and no result is wrong meanwhile."""
    monkeypatch.setattr(graphs, "ROOM_MARGIN", 1.0)
    model = tiny_model()
    executor = graphed(model, share)
    for seed in (*range(6), *range(6)):
        for t in SCHEDULE[:2]:
            assert relative_difference(forward(model, t, seed), reference(model, t, seed)) < 1e-5
    if share == 1.0:
        assert executor.overflows == 0
    else:
        assert executor.overflows > 0
    # What is learned settles: the same images again overflow no more.
    before = executor.overflows
    for seed in range(6):
        for t in SCHEDULE[:2]:
            forward(model, t, seed)
    assert (executor.overflows == before) == (share in (None, 1.0))


def test_results_are_the_callers_own() -> None:
    """A later step must not write into what an earlier one returned."""
    model = tiny_model()
    graphed(model)
    for _ in range(2):
        first = forward(model, 640.0, seed=1)
    kept = first.clone()
    second = forward(model, 640.0, seed=2)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_a_stock_pipeline_draws_the_same_images() -> None:
    model = tiny_model(learn_sigma=False).requires_grad_(False).set_execution("compact")
    expected = draw(pipeline_of(model), 4)
    executor = graphed(model)
    for _ in range(3):
        torch.testing.assert_close(draw(pipeline_of(model), 4), expected, atol=1e-4, rtol=0)
    assert executor.graphs.recorded == 4
    assert executor.graphs.replays == 8


def test_inference_mode_and_back() -> None:
    model = tiny_model()
    graphed(model)
    expected = reference(model, 320.0)
    with torch.inference_mode():
        for _ in range(2):
            forward(model, 320.0)
    assert relative_difference(forward(model, 320.0), expected) < 1e-5
    with torch.inference_mode():
        assert relative_difference(forward(model, 320.0).clone(), expected) < 1e-5


def test_threads_share_recordings() -> None:
    model = tiny_model()
    executor = graphed(model)
    jobs = [(t, seed) for t in SCHEDULE for seed in range(3)] * 3
    expected = {job: reference(model, *job) for job in jobs}
    with ThreadPoolExecutor(4) as pool:
        for job, found in zip(jobs, pool.map(lambda job: forward(model, *job), jobs), strict=True):
            assert relative_difference(found, expected[job]) < 1e-5
    assert executor.graphs.replays > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("share", [None, 0.6])
@torch.no_grad()
def test_on_a_cuda_device(dtype: torch.dtype, share: float | None) -> None:
    """Recorded by CUDA itself, and replayed on another stream as well."""
    model = tiny_model().to("cuda", dtype)
    executor = GraphedCompactExecutor(share, gather_from=0)
    model.requires_grad_(False)._executor = executor
    images, _, labels = (part.to("cuda") for part in tiny_inputs(model))
    model.plan(SCHEDULE, labels)
    for run in range(4):
        with torch.cuda.stream(torch.cuda.Stream() if run == 3 else torch.cuda.current_stream()):
            noisy = images + 0.1 * run
            for t in SCHEDULE:
                expected, decided = model.denoise(noisy, t, labels, executor=CompactExecutor())
                found, record = model.denoise(noisy, t, labels)
                if torch.equal(record.tokens, decided.tokens):
                    assert relative_difference(found, expected) < TOLERANCES[dtype]
            torch.cuda.synchronize()
    assert executor.graphs.recorded >= 4
    assert executor.graphs.replays >= 12


# ------------------------------------------------------------------ static


@each_backbone
@torch.no_grad()
def test_static_steps(family: Family) -> None:
    model = tiny_model(family).requires_grad_(False)
    executor = GraphedStaticExecutor(recorder_for=StandInRecorder)
    images, times, labels = tiny_inputs(model)
    for gating in (CompleteGating(), ThresholdGating()):
        for t in times:
            expected, decided = model.denoise(images, t, labels, executor=StaticExecutor(), gating=gating)
            found, record = model.denoise(images, t, labels, executor=executor, gating=gating)
            assert relative_difference(found, expected) < 1e-6
            assert torch.equal(record.tokens, decided.tokens)
    # One recording serves all timesteps.
    assert executor.graphs.recorded == 1
    assert executor.graphs.replays == 5


# ------------------------------------------------------------------ what is not recorded


def imposed(model: DynamicTransformer) -> Gating:
    return ImposedGating(random_routing(model.geometry, 3, shared=True))


@torch.no_grad()
def test_mixed_timesteps_and_imposed_masks_run_eagerly() -> None:
    model = tiny_model()
    executor = graphed(model)
    images, times, labels = tiny_inputs(model)
    expected, _ = model.denoise(images, times, labels, executor=DenseExecutor())
    masks = imposed(model)
    dense, _ = model.denoise(images, 500.0, labels, executor=DenseExecutor(), gating=masks)
    for _ in range(3):
        assert relative_difference(model(images, times, labels).sample, expected) < 1e-5
        found, _ = model.denoise(images, 500.0, labels, gating=masks)
        assert relative_difference(found, dense) < 1e-5
    assert executor.graphs.recorded == 0


def test_gradients_and_autocast_run_eagerly() -> None:
    model = tiny_model()
    executor = graphed(model)
    images, _, labels = tiny_inputs(model)
    images.requires_grad_()
    for _ in range(3):
        model(images, 640.0, labels).sample.square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(images, 640.0, labels)
    assert images.grad is not None
    assert executor.graphs.recorded == 0


def test_hooks_are_called() -> None:
    model = tiny_model()
    executor = graphed(model)
    for _ in range(2):
        forward(model, 640.0)
    assert executor.graphs.replays == 1
    calls: list[object] = []
    handle = model.blocks[1].register_forward_hook(lambda *given: calls.append(given))
    for _ in range(3):
        forward(model, 640.0)
    assert len(calls) == 3
    handle.remove()
    forward(model, 640.0)
    assert executor.graphs.replays == 2


def test_weights_that_move_are_not_recorded() -> None:
    model = tiny_model()
    times = [float(t) for t in range(990, 0, -30)]
    executor = graphed(model, slice_budget=0.0)
    assert model.plan(times).policies["swap"] > 0
    for t in times[:4] * 3:
        assert relative_difference(forward(model, t), reference(model, t)) < 1e-5
    assert executor.graphs.recorded == 0


def test_layers_of_other_libraries_run_eagerly() -> None:
    class Foreign(nn.Linear):
        """As an adapter: a Python value decides what it computes."""

        scale = 1.0

        def forward(self, inputs: Tensor) -> Tensor:
            return self.scale * super().forward(inputs)

    Foreign.__module__ = "foreign.layers"
    model = tiny_model()
    old = model.final_layer.linear
    model.final_layer.linear = Foreign(old.in_features, old.out_features)
    executor = graphed(model)
    results = []
    for Foreign.scale in (1.0, 1.0, 1.0, 2.0):
        results.append(forward(model, 640.0))
    assert executor.graphs.recorded == 0
    assert relative_difference(results[-1], 2 * results[0]) < 1e-5


# ------------------------------------------------------------------ what a recording is a function of


@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
@torch.no_grad()
def test_an_edit_is_seen(edit: Edit) -> None:
    model = tiny_model()
    graphed(model)
    times = SCHEDULE[:2]
    before = [[forward(model, t) for t in times] for _ in range(2)][-1]
    edit(model)
    model.requires_grad_(False)
    for _ in range(3):
        after = [forward(model, t) for t in times]
        assert not all(map(torch.equal, before, after))
        for t, found in zip(times, after, strict=True):
            assert relative_difference(found, reference(model, t)) < 1e-5


def edit_positions(model: DynamicTransformer) -> None:
    model.pos_embed += 0.5


def replace_positions(model: DynamicTransformer) -> None:
    model.pos_embed = nn.Parameter(model.pos_embed + 0.5, requires_grad=False)


def replace_embedder(model: DynamicTransformer) -> None:
    model.x_embedder = copy.deepcopy(model.x_embedder)
    model.x_embedder.proj.weight.mul_(2)


def swap_final(model: DynamicTransformer) -> None:
    model.final_layer.linear.weight.data = model.final_layer.linear.weight.data * 2


OUTSIDE = [edit_positions, replace_positions, replace_embedder, swap_final]


@pytest.mark.parametrize("static", [False, True], ids=["compact", "static"])
@pytest.mark.parametrize("edit", OUTSIDE, ids=[edit.__name__ for edit in OUTSIDE])
@torch.no_grad()
def test_an_edit_outside_of_the_blocks_is_seen(
    edit: Callable[[DynamicTransformer], None], static: bool
) -> None:
    model = tiny_model()
    graphed(model)
    if static:
        model._executor = GraphedStaticExecutor(recorder_for=StandInRecorder)
    for _ in range(2):
        before = forward(model, 640.0)
    edit(model)
    images, _, labels = tiny_inputs(model)
    eager = StaticExecutor() if static else CompactExecutor()
    expected, _ = model.denoise(images, 640.0, labels, executor=eager)
    for _ in range(3):
        after = forward(model, 640.0)
        assert not torch.equal(before, after)
        assert relative_difference(after, expected) < 1e-5


def test_the_dial_and_the_batch_size() -> None:
    model = tiny_model()
    executor = graphed(model)
    for _ in range(3):
        for dial in (0.0, 1.0):
            model.set_keep_bias(dial)
            for batch in (2, 3):
                images, _, labels = tiny_inputs(model, batch)
                with torch.no_grad():
                    expected, _ = model.denoise(images, 640.0, labels, executor=CompactExecutor())
                    assert relative_difference(model(images, 640.0, labels).sample, expected) < 1e-5
    assert executor.graphs.recorded == 4


def test_budgets_are_recorded_apart() -> None:
    """A budget moves widths and the token logits; what was recorded for another one is dropped."""
    model = tiny_model(budgets=(0.3, 1.0))
    with torch.no_grad():
        model.budget_router.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    executor = graphed(model)
    for budget in (0.4, 0.9, 0.4):
        model.set_budget(budget)
        for _ in range(3):
            assert relative_difference(forward(model, 640.0), reference(model, 640.0)) < 1e-5
    assert executor.graphs.recorded - executor.overflows == 3
    assert executor.graphs.replays == 6


def test_a_timestep_that_nobody_announced_is_recorded_too() -> None:
    """A stock pipeline plans nothing: its first run asks the routers, its second records, its third is played back."""
    model = tiny_model()
    executor = graphed(model)
    for run in range(3):
        for t in SCHEDULE:
            assert relative_difference(forward(model, t), reference(model, t)) < 1e-5
        assert executor.graphs.recorded == (0 if run == 0 else 4)
    assert executor.plan is not None
    assert (executor.plan.hits, executor.plan.misses) == (8, 4)


def test_recordings_outlive_a_plan_that_moves_no_slab() -> None:
    """`dydit sample` and its like plan anew for every run."""
    model = tiny_model()
    executor = graphed(model)
    for run in range(4):
        model.plan(SCHEDULE, [0, 10])
        for t in SCHEDULE:
            forward(model, t)
        assert executor.graphs.recorded == (0 if run == 0 else 4)


def test_a_plan_that_moves_slabs_drops_recordings() -> None:
    model = tiny_model(num_layers=2)
    executor = graphed(model)
    model.plan(SCHEDULE[:1])
    for _ in range(2):
        forward(model, SCHEDULE[0])
    moved = executor.copied_bytes
    for t in SCHEDULE[1:]:
        model.plan([t])
    assert executor.copied_bytes > moved
    assert len(executor.graphs) == 0
    for t in SCHEDULE * 3:
        assert relative_difference(forward(model, t), reference(model, t)) < 1e-5


def test_copied_weights_stay_with_their_recording() -> None:
    """The store drops slices that do not fit its budget; a recording still reads them."""
    model = tiny_model()
    executor = graphed(model, slice_budget=0.0)
    for _ in range(3):
        for t in SCHEDULE:
            assert relative_difference(forward(model, t), reference(model, t)) < 1e-5
    assert executor.graphs.recorded == 4
    held = sum(graph.nbytes for graph in executor.graphs._graphs.values())
    outputs = sum(graph.recording.nbytes for graph in executor.graphs._graphs.values())
    assert held > outputs


# ------------------------------------------------------------------ bounds


def test_the_least_recently_used_go_first() -> None:
    model = tiny_model()
    executor = graphed(model, most=2)
    for _ in range(2):
        for t in SCHEDULE[:2]:
            forward(model, t)
    recorder = executor.graphs.recorder(torch.device("cpu"))
    assert (len(executor.graphs), recorder.waits) == (2, 0)
    for _ in range(2):
        forward(model, SCHEDULE[0])
        forward(model, SCHEDULE[2])
    assert (len(executor.graphs), recorder.waits) == (2, 1)
    recorded = executor.graphs.recorded
    forward(model, SCHEDULE[0])
    assert executor.graphs.recorded == recorded
    assert relative_difference(forward(model, SCHEDULE[1]), reference(model, SCHEDULE[1])) < 1e-5
    assert executor.graphs.recorded == recorded + 1


def test_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    executor = graphed(model)
    for _ in range(2):
        for t in SCHEDULE:
            forward(model, t)
    whole = executor.graphs.nbytes
    monkeypatch.setattr(StepGraphs, "run", within(StepGraphs.run, whole / 2))
    executor.release()
    assert executor.graphs.nbytes == 0
    for _ in range(3):
        for t in SCHEDULE:
            assert relative_difference(forward(model, t), reference(model, t)) < 1e-5
            assert executor.graphs.nbytes <= whole / 2
    assert len(executor.graphs) < 4


def within(run: Callable[..., Any], budget: float) -> Callable[..., Any]:
    def bounded(self: StepGraphs, *arguments: Any) -> Any:
        return run(self, *arguments[:-1], budget)

    return bounded


def test_casting_gives_all_back() -> None:
    model = tiny_model()
    executor = graphed(model)
    for _ in range(2):
        forward(model, 640.0)
    assert executor.graphs.nbytes > 0
    model.to(torch.bfloat16)
    assert executor.graphs.nbytes == 0
    assert forward(model, 640.0).dtype == torch.bfloat16


def test_room() -> None:
    assert [room_for(count, 1024) for count in (0, 1, 500, 1000)] == [8, 8, 600, 1024]
    assert room_for(10, 512) == 512


# ------------------------------------------------------------------ what is left to the host


class Operations(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_what_the_host_starts_does_not_depend_on_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for depth in (2, 6):
        model = tiny_model(num_layers=depth)
        executor = graphed(model)
        images, _, labels = tiny_inputs(model)
        model.plan([640.0], labels)
        with torch.no_grad():
            for _ in range(2):
                model(images, 640.0, labels)
            (graph,) = executor.graphs._graphs.values()
            monkeypatch.setattr(graph.recording, "replay", lambda: None)
            with Operations() as operations:
                model(images, 640.0, labels)
        counts.append(operations.count)
    assert counts[0] == counts[1]
    assert counts[0] <= 16


# ------------------------------------------------------------------ the option


@pytest.mark.parametrize("options", [{}, {"token_capacity": 0.8}])
def test_without_cuda_the_option_is_an_error(options: dict[str, Any], tmp_path: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    model = tiny_model()
    with pytest.raises(DyditError, match="CUDA graphs need a CUDA device"):
        model.set_execution("compact", graphs=True, **options)
    assert model.execution == "dense"
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(DyditError, match="CUDA graphs need a CUDA device"):
        dydit_cli.load_model(tmp_path / "m", graphs=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "dense"}, "not recorded in dense execution"),
        ({"name": "compact", "compile": True}, "Compiling does not go with CUDA graphs"),
        ({"name": "static", "token_capacity": 0.8}, "does not go with static execution"),
        ({"name": "compcat"}, "no execution called 'compcat'"),
    ],
)
def test_what_does_not_go_together_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DyditError, match=message):
        tiny_model().set_execution(graphs=True, **options)


def test_the_option_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "require_cuda", lambda: None)
    model = tiny_model().requires_grad_(False)
    for name, share in (("compact", None), ("compact", 0.7), ("static", None)):
        model.set_execution(name, graphs=True, token_capacity=share)
        executor = model._executor
        assert model.execution_options == {
            "name": name,
            "compile": False,
            "graphs": True,
            "token_capacity": share,
        }
        assert model.set_execution(**model.execution_options)._executor is executor
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.execution_options == model.execution_options
            assert other._executor is not executor
        # On a CPU nothing records, and all the same it runs.
        for _ in range(2):
            forward(model, 640.0)
        assert executor.graphs.recorded == 0


def test_copies_record_their_own() -> None:
    model = tiny_model()
    executor = graphed(model)
    for _ in range(2):
        expected = forward(model, 640.0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(2):
            assert relative_difference(forward(other, 640.0), expected) < 1e-5
        assert other._executor.graphs.recorded == 1
    assert executor.graphs.recorded == 1
