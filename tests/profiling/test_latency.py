"""Time and memory: what runs, not how fast."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.data.conditions import conditions_of
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.objectives import objective_for
from dydit_cli.profiling.latency import LEVELS, LatencyReport, measure_latency
from tests.profiling.sources import source_for
from tests.tiny import each_family, tiny_model


def measured(model: DynamicTransformer, batch: int = 2, **options) -> LatencyReport:
    source = source_for(model, batch)
    clean, condition = source.batch(range(batch)), conditions_of(source, range(batch))
    return measure_latency(model, objective_for(model.family), clean, condition, repetitions=2, **options)


@each_family
def test_the_noisiest_level_is_run_first(family) -> None:
    report = measured(tiny_model(family))
    objective = objective_for(family.name)
    levels = objective.noise_level(torch.tensor(report.timesteps)).tolist()
    assert len(levels) == LEVELS
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 0.85
    assert levels[-1] < 0.4


def test_times_and_ratios_are_positive_and_named() -> None:
    report = measured(tiny_model())
    assert min(report.static_ms, report.dense_ms, report.compact_ms) > 0
    assert report.interval[0] <= report.ratio <= report.interval[1]
    assert (report.batch, report.repetitions, report.dtype) == (2, 2, "float32")
    assert report.device.startswith("cpu")
    assert report.threads == torch.get_num_threads()


def test_each_execution_runs_and_compact_finds_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    seen: list[tuple[str, float]] = []
    plain = type(model).denoise

    def spy(self, hidden_states, timestep, class_labels, *, executor=None, gating=None):
        result = plain(self, hidden_states, timestep, class_labels, executor=executor, gating=gating)
        used = executor or self._executor
        seen.append((used.name, float(timestep[0])))
        if used.name == "compact":
            assert used.plan is not None
            assert used.plan.misses == 0
        return result

    monkeypatch.setattr(type(model), "denoise", spy)
    report = measured(model)
    # Packing, memory, warm-up and two rounds for compact; no packing for the others.
    counts = {name: sum(used == name for used, _ in seen) for name in ("static", "dense", "compact")}
    assert counts == {"static": 4 * LEVELS, "dense": 4 * LEVELS, "compact": 5 * LEVELS}
    assert {t for _, t in seen} == set(report.timesteps)


def test_compact_memory_is_less_where_little_is_on_and_packed_weights_are_counted() -> None:
    model = tiny_model(hidden_size=96, num_layers=2)
    for block in model.dynamic_blocks:
        for router in (block.head_router, block.channel_router):
            torch.nn.init.constant_(router.linear.bias, -1e6)
        torch.nn.init.constant_(block.token_router.score.bias, -1e6)
    report = measured(model, batch=8)
    assert report.peak_mib["compact"] < 0.8 * report.peak_mib["static"]
    sliceable = sum(
        weight.numel() * 4
        for block in model.dynamic_blocks
        for weight in (
            block.attn.qkv.weight,
            block.attn.proj.weight,
            block.mlp.fc1.weight,
            block.mlp.fc2.weight,
        )
    )
    assert sliceable / 2**20 < report.packed_mib < 1.1 * sliceable / 2**20


def test_half_precision_runs_on_a_copy() -> None:
    model = tiny_model()
    assert measured(model, dtype=torch.bfloat16).dtype == "bfloat16"
    assert model.dtype == torch.float32
