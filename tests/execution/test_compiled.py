"""Compiled blocks: one graph, at most one recompilation, and the result of eager execution.

All but one test compile with a backend that runs the captured graph as it is: what torch captures, guards and compiles again is
the same, and it takes no C++ compiler.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import dydit_cli
from dydit_cli.dynamic.gates import (
    CompleteGating,
    FrozenWidthGating,
    Gating,
    ImposedGating,
    ThresholdGating,
)
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import (
    CompactExecutor,
    CompiledCompactExecutor,
    CompiledStaticExecutor,
    StaticExecutor,
    compiled,
)
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

BATCH = 3
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
UNITS, TOKENS = 6, 16


class Counting:
    """A backend of `torch.compile` that runs graphs as they were captured and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def __deepcopy__(self, memo: Any) -> Counting:
        return Counting()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@torch.no_grad()
def run(
    model: DynamicTransformer, executor: CompactExecutor | StaticExecutor, gating: Gating, batch: int = BATCH
) -> tuple[Tensor, Routing]:
    return model.denoise(*tiny_inputs(model, batch), executor=executor, gating=gating)


def imposed(model: DynamicTransformer, heads: int, groups: int, tokens: int) -> ImposedGating:
    return ImposedGating(uniform_routing(model.geometry, BATCH, heads=heads, groups=groups, tokens=tokens))


def kinds_of_blocks(model: DynamicTransformer) -> int:
    """In how many ways tokens attend to each other: graphs are counted for each."""
    return len({block.attn.sequences for block in model.dynamic_blocks})


STEPS = [(3, 4, 7), (2, 2, 0), (1, 3, TOKENS), (UNITS, UNITS, 1), (UNITS, 1, TOKENS), (1, 1, 0), (4, 2, 9)]
"""Active heads, groups and tokens; the corners among them."""


@each_backbone
@pytest.mark.parametrize("start", range(len(STEPS)))
def test_one_graph_and_at_most_one_recompilation(family: Family, start: int) -> None:
    """Whatever the first step looks like, later ones with other counts of tokens and units compile at most once more."""
    model, backend = tiny_model(family), Counting()
    executor = CompiledCompactExecutor(backend=backend)
    for heads, groups, tokens in STEPS[start:] + STEPS[:start]:
        gating = imposed(model, heads, groups, tokens)
        eager, _ = run(model, CompactExecutor(), gating)
        found, record = run(model, executor, gating)
        assert relative_difference(found, eager) < 1e-5
        assert int(record.tokens.sum()) == BATCH * model.geometry.depth * tokens
    # All blocks and all steps: a break would show as graphs of parts.
    assert 1 <= len(backend.graphs) <= 2 * kinds_of_blocks(model)
    names = {str(node.target) for node in backend.graphs[0].graph.nodes}
    assert {"nonzero", "index_copy"} <= {name.rpartition(".")[2] for name in names}


def test_prefixes_and_scattered_units_share_a_graph() -> None:
    """A view of the packed weights and a copy of some of them differ for torch in nothing that it guards."""
    model, backend = tiny_model(), Counting()
    executor = CompiledCompactExecutor(backend=backend)
    for seed in range(6):
        gating = ImposedGating(random_routing(model.geometry, BATCH, seed, shared=True))
        eager, _ = run(model, CompactExecutor(), gating)
        assert relative_difference(run(model, executor, gating)[0], eager) < 1e-5
    assert len(backend.graphs) <= 2


@each_backbone
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_live_decisions_are_those_of_eager_execution(family: Family, dtype: torch.dtype) -> None:
    model, backend = tiny_model(family).to(dtype).set_execution("compact"), Counting()
    images, times, labels = tiny_inputs(model)
    executor = CompiledCompactExecutor(backend=backend)
    with torch.no_grad():
        for bias in (0.0, 0.3, -0.3, float("inf")):
            for t in times:
                gating = ThresholdGating(bias)
                eager, first = model.denoise(images, t, labels, executor=CompactExecutor(), gating=gating)
                found, second = model.denoise(images, t, labels, executor=executor, gating=gating)
                if dtype == torch.float32:
                    assert torch.equal(first.tokens, second.tokens)
                same = bool(torch.equal(first.tokens, second.tokens))
                assert not same or relative_difference(found, eager) < TOLERANCES[dtype]
    assert 1 <= len(backend.graphs) <= 2 * kinds_of_blocks(model)


def test_gatings_share_a_graph() -> None:
    model, backend = tiny_model(), Counting()
    executor = CompiledCompactExecutor(backend=backend)
    widths = random_routing(model.geometry, BATCH, shared=True)
    gatings = (CompleteGating(), ImposedGating(widths), FrozenWidthGating(widths, ThresholdGating(0.1)))
    for gating in gatings:
        eager, expected = run(model, CompactExecutor(), gating)
        found, record = run(model, executor, gating)
        assert relative_difference(found, eager) < 1e-5
        assert torch.equal(record.tokens, expected.tokens)
    assert len(backend.graphs) <= 2


def test_budgets_run_in_the_graph() -> None:
    """A budget adds to the token logits, block by block: another input, no other graph."""
    model, backend = tiny_model(budgets=(0.3, 1.0)), Counting()
    with torch.no_grad():
        model.budget_router.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    executor = CompiledCompactExecutor(backend=backend)
    for budget in (0.4, 0.9):
        model.set_budget(budget)
        gating = imposed_widths(model)
        eager, expected = run(model, CompactExecutor(), gating)
        found, record = run(model, executor, gating)
        assert torch.equal(record.tokens, expected.tokens)
        assert relative_difference(found, eager) < 1e-5
    assert 1 <= len(backend.graphs) <= 2


def imposed_widths(model: DynamicTransformer) -> FrozenWidthGating:
    widths = random_routing(model.geometry, BATCH, shared=True)
    return FrozenWidthGating(widths, ThresholdGating())


@pytest.mark.parametrize("changes", [{}, {"always_on": False}], ids=["usual", "no always-on unit"])
def test_what_a_graph_does_not_take_runs_eagerly(changes: dict[str, Any]) -> None:
    model, backend = tiny_model(**changes), Counting()
    executor = CompiledCompactExecutor(backend=backend)
    cases = [
        ImposedGating(random_routing(model.geometry, BATCH)),  # a width of its own for each sample
        imposed(model, 0, 3, 5),
        imposed(model, 3, 0, 5),
        imposed(model, 0, 0, 0),
    ]
    for gating in cases:
        eager, _ = run(model, CompactExecutor(), gating)
        assert relative_difference(run(model, executor, gating)[0], eager) < 1e-5
    assert not backend.graphs


def test_gradients_are_not_lost() -> None:
    """Who wants a gradient gets it, by way of eager execution."""
    model, backend = tiny_model().requires_grad_(True), Counting()
    gating = imposed(model, 3, 4, 7)
    gradients = []
    for executor in (CompactExecutor(), CompiledCompactExecutor(backend=backend)):
        model.zero_grad()
        sample, _ = model.denoise(*tiny_inputs(model), executor=executor, gating=gating)
        sample.square().mean().backward()
        gradients.append(model.x_embedder.proj.weight.grad.clone())
    assert gradients[0].any()
    assert relative_difference(gradients[1], gradients[0]) < 1e-5
    assert not backend.graphs


def test_autocast_runs_eagerly() -> None:
    model, backend = tiny_model(), Counting()
    gating = imposed(model, 3, 4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, _ = run(model, CompactExecutor(), gating)
        found, _ = run(model, CompiledCompactExecutor(backend=backend), gating)
    assert torch.equal(found, eager)
    assert not backend.graphs


def test_changed_weights_are_seen() -> None:
    """Weights are inputs of the graph: nothing of them is compiled in."""
    model, backend = tiny_model().requires_grad_(False), Counting()
    executor, gating = CompiledCompactExecutor(backend=backend), imposed(model, 3, 4, 7)
    before, _ = run(model, executor, gating)
    for block in model.blocks:
        block.mlp.fc1.weight.data += 0.1
        block.attn.proj.bias.data += 0.1
        block.token_router.score.bias.data += 0.1
    eager, _ = run(model, CompactExecutor(), gating)
    found, _ = run(model, executor, gating)
    assert relative_difference(found, before) > 1e-3
    assert relative_difference(found, eager) < 1e-5
    assert len(backend.graphs) == 1


def test_a_new_batch_size_compiles_once_and_then_no_more() -> None:
    model, backend = tiny_model(), Counting()
    executor = CompiledCompactExecutor(backend=backend)
    counts = []
    for batch in (4, 6, 3, 8, 5):
        gating = ImposedGating(random_routing(model.geometry, batch, shared=True))
        eager, _ = run(model, CompactExecutor(), gating, batch)
        assert relative_difference(run(model, executor, gating, batch)[0], eager) < 1e-5
        counts.append(len(backend.graphs))
    assert counts[-1] == counts[-3]
    assert counts[-1] <= 3


def test_models_do_not_use_up_each_others_compilations() -> None:
    """torch counts compilations by function and gives up after some; every executor has a function of its own."""
    for index in range(10):
        model, backend = tiny_model(hidden_size=24 * (1 + index % 3), num_layers=1), Counting()
        gating = imposed(model, 3, 4, 7)
        eager, _ = run(model, CompactExecutor(), gating)
        found, _ = run(model, CompiledCompactExecutor(backend=backend), gating)
        assert relative_difference(found, eager) < 1e-5
        assert len(backend.graphs) == 1


def test_beyond_torchs_limit_blocks_run_eagerly() -> None:
    model, backend = tiny_model(), Counting()
    executor = CompiledCompactExecutor(backend=backend)
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        for batch in (2, 3, 4):
            gating = ImposedGating(random_routing(model.geometry, batch, shared=True))
            eager, _ = run(model, CompactExecutor(), gating, batch)
            assert relative_difference(run(model, executor, gating, batch)[0], eager) < 1e-5
    assert len(backend.graphs) == 1


def test_settings_of_the_process_stay() -> None:
    model = tiny_model()
    before = torch._dynamo.config.capture_dynamic_output_shape_ops
    seen = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(torch._dynamo.config.capture_dynamic_output_shape_ops)
        return graph.forward

    run(model, CompiledCompactExecutor(backend=backend), imposed(model, 3, 4, 7))
    assert seen == [True]
    assert torch._dynamo.config.capture_dynamic_output_shape_ops is before is False


def test_a_compiler_that_fails_is_explained() -> None:
    def broken(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise OSError("no compiler on this machine")

    model = tiny_model()
    with pytest.raises(DyditError) as caught:
        run(model, CompiledCompactExecutor(backend=broken), imposed(model, 3, 4, 7))
    assert "no compiler on this machine" in str(caught.value.why)


def test_two_threads_give_the_result_of_one() -> None:
    model, backend = tiny_model(), Counting()
    executor = CompiledCompactExecutor(backend=backend)
    gatings = [imposed(model, 3, 4, 7), imposed(model, 5, 2, 3)]
    expected = [run(model, CompactExecutor(), gating)[0] for gating in gatings]
    found: list[list[Tensor]] = [[], []]

    def work(which: int) -> None:
        for _ in range(4):
            found[which].append(run(model, executor, gatings[which])[0])

    threads = [Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, reference in zip(found, expected, strict=True):
        assert len(outputs) == 4
        assert all(relative_difference(output, reference) < 1e-5 for output in outputs)


# ------------------------------------------------------------------ static


@each_backbone
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_static_blocks_are_one_graph(family: Family, dtype: torch.dtype) -> None:
    model, backend = tiny_model(family).to(dtype), Counting()
    eager, expected = run(model, StaticExecutor(), CompleteGating())
    executor = CompiledStaticExecutor(backend=backend)
    for _ in range(2):
        found, record = run(model, executor, CompleteGating())
        assert relative_difference(found, eager) < TOLERANCES[dtype]
        assert torch.equal(record.tokens, expected.tokens)
    assert len(backend.graphs) == kinds_of_blocks(model)


# ------------------------------------------------------------------ the option


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Make every compiled executor count instead of calling a C++ compiler."""
    backend, plain = Counting(), compiled.FullGraph.__init__

    def patched(self: compiled.FullGraph, function: Callable[..., Any], given: compiled.Backend) -> None:
        plain(self, function, backend if given == "inductor" else given)

    monkeypatch.setattr(compiled.FullGraph, "__init__", patched)
    return backend


@torch.no_grad()
def test_the_option_of_a_model(counting: Counting) -> None:
    model = tiny_model().requires_grad_(False)
    images, times, labels = tiny_inputs(model)
    eager = {
        name: model.set_execution(name)(images, times[0], labels).sample for name in ("compact", "static")
    }
    for name, expected in eager.items():
        assert model.set_execution(name, compile=True).execution == name
        assert model.is_compiled
        executor = model._executor
        before = len(counting.graphs)
        assert relative_difference(model(images, times[0], labels).sample, expected) < 1e-5
        assert len(counting.graphs) > before
        assert model.set_execution(name, compile=True)._executor is executor
        assert not model.set_execution(name).is_compiled
    with pytest.raises(DyditError, match="not compiled"):
        model.set_execution("dense", compile=True)


@torch.no_grad()
def test_a_plan_keeps_the_compiled_executor(counting: Counting) -> None:
    model = tiny_model().requires_grad_(False).set_execution("compact", compile=True)
    images, times, labels = tiny_inputs(model)
    eager = tiny_model().set_execution("compact")
    for given in (None, labels):
        plan = model.plan(times) if given is None else model.plan(times, given)
        assert model.is_compiled
        hits = plan.hits
        for t in times:
            expected = eager(images, t, labels).sample
            assert relative_difference(model(images, t, labels).sample, expected) < 1e-5
        assert plan.hits == hits + len(times)
    # Values from the plan's table and values computed just now make one graph.
    assert 1 <= len(counting.graphs) <= 2


@torch.no_grad()
def test_copies_of_a_model_compile_for_themselves(counting: Counting) -> None:
    for name in ("compact", "static"):
        model = tiny_model().set_execution(name, compile=True)
        images, times, labels = tiny_inputs(model)
        expected = model(images, times[0], labels).sample
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.is_compiled
            assert other._executor is not model._executor
            assert relative_difference(other(images, times[0], labels).sample, expected) < 1e-5


def test_load_model_compiles(counting: Counting, tmp_path: Any) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    loaded = dydit_cli.load_model(tmp_path / "m", compile=True)
    assert loaded.is_compiled
    images, times, labels = tiny_inputs(model)
    with torch.no_grad():
        expected = model.set_execution("compact")(images, times[0], labels).sample
        assert relative_difference(loaded(images, times[0], labels).sample, expected) < 1e-5
    assert counting.graphs
    with pytest.raises(DyditError, match="not compiled"):
        dydit_cli.load_model(tmp_path / "m", execution="dense", compile=True)


# ------------------------------------------------------------------ with the real compiler


@pytest.mark.slow
def test_with_inductor() -> None:
    """Machine code: the same results and no more than one recompilation, counted by torch."""
    model = tiny_model()
    compact, static = CompiledCompactExecutor(), CompiledStaticExecutor()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for heads, groups, tokens in STEPS:
        gating = imposed(model, heads, groups, tokens)
        eager, _ = run(model, CompactExecutor(), gating)
        assert relative_difference(run(model, compact, gating)[0], eager) < 1e-5
    assert 1 <= graphs["unique_graphs"] - before <= 2
    eager, _ = run(model, StaticExecutor(), CompleteGating())
    assert relative_difference(run(model, static, CompleteGating())[0], eager) < 1e-5
