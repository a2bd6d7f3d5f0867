"""The report of a model: its keys, and that its numbers hang together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_cli.artifacts import save_model
from dydit_cli.families.family import Family
from dydit_cli.families.registry import preset_named
from dydit_cli.flops import macs_of
from dydit_cli.profiling.inputs import Inputs
from dydit_cli.profiling.profile import ProfileReport, ProfileSettings, profile
from tests.profiling.sources import source_for
from tests.tiny import each_family, tiny_inputs, tiny_model

SETTINGS = ProfileSettings(timesteps=4, latency_batch=2, repetitions=3)
KEYS = {
    "gmacs", "gmacs_without_layernorm", "static_gmacs", "static_gmacs_without_layernorm", "router_gmacs", "ratio",
    "total_ratio", "trajectory_ratio", "floor", "params", "timesteps", "blocks", "counted", "latency", "inputs",
    "model", "settings", "versions",
}  # fmt: skip
TIMESTEP_KEYS = {"t", "noise_level", "heads", "groups", "tokens", "gmacs", "ratio"}
LATENCY_KEYS = {
    "compiled", "graphs",
    "static_ms", "dense_ms", "compact_ms", "ratio", "interval", "dense_ratio", "repetitions", "timesteps", "batch",
    "threads", "device", "dtype", "peak_mib", "packed_mib", "memory_method",
}  # fmt: skip


def inputs_for(model) -> Inputs:
    return Inputs(source_for(model, 8), True, "here", "8 samples made here.")


def profiled(model, **changes: Any) -> ProfileReport:
    return profile(model, ProfileSettings(**{**SETTINGS.__dict__, **changes}), inputs=inputs_for(model))


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return profiled(tiny_model())


def test_the_keys_of_the_json_are_frozen(report: ProfileReport) -> None:
    content = report.to_json()
    assert set(content) == KEYS
    assert {frozenset(row) for row in content["timesteps"]} == {frozenset(TIMESTEP_KEYS)}
    assert set(content["latency"]) == LATENCY_KEYS
    assert set(content["params"]) == {"total", "routers", "static"}
    assert set(content["counted"]) == {"static", "compact"}
    assert set(content["blocks"]) == {"t", "noise_level", "heads", "groups", "tokens"}
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_shares_are_shares(report: ProfileReport) -> None:
    for row in report.timesteps:
        assert all(
            0 <= share <= 1 for share in (row.heads, row.groups, row.tokens, row.ratio, row.noise_level)
        )


def test_the_ratios_hang_together(report: ProfileReport) -> None:
    assert report.floor < report.ratio < 1
    assert report.total_ratio == pytest.approx(report.gmacs / report.static_gmacs)
    assert report.ratio == pytest.approx(sum(row.ratio for row in report.timesteps) / 4)
    assert report.gmacs == pytest.approx(sum(row.gmacs for row in report.timesteps) / 4)
    assert report.trajectory_ratio is None


def test_parameters_add_up(report: ProfileReport) -> None:
    model = tiny_model()
    assert report.params.total == sum(parameter.numel() for parameter in model.parameters())
    assert report.params.routers == sum(p.numel() for n, p in model.named_parameters() if "_router." in n) > 0
    assert report.params.static == report.params.total - report.params.routers


@each_family
def test_formula_and_counters_agree(family: Family) -> None:
    report = profiled(tiny_model(family), latency=False)
    assert report.latency is None
    assert all(counted.agrees for counted in report.counted.values())
    assert report.counted["static"].t is None
    assert report.counted["compact"].formula < report.counted["static"].formula


def test_a_static_model_is_profiled_without_routers_or_inputs() -> None:
    model = tiny_model().set_execution("static")
    report = profile(model, ProfileSettings(timesteps=4, latency=False))
    assert report.gmacs == report.static_gmacs == macs_of(model.geometry).total / 1e9
    assert report.ratio == report.total_ratio == 1
    assert report.router_gmacs > 0
    assert set(report.counted) == {"static"}
    assert report.inputs is None
    assert [row.heads for row in report.timesteps] == [1.0] * 4
    assert set(report.to_json()) == KEYS


def test_the_static_formula_of_dit_xl() -> None:
    """The count that `dydit profile --preset dit-xl/2` prints; the counters' own run on it is a slow test."""
    family, config = preset_named("dit-xl/2")
    with torch.device("meta"):
        geometry = family.model_class(**config).geometry
    assert f"{macs_of(geometry).total / 1e9:.2f}" == "118.69"
    assert f"{macs_of(geometry).total_without_layernorm / 1e9:.2f}" == "118.62"


def test_a_dynamic_model_needs_inputs() -> None:
    with pytest.raises(ValueError, match="inputs"):
        profile(tiny_model())


def test_the_dial_moves_the_ratio_and_infinity_is_everything(report: ProfileReport) -> None:
    everything = profiled(tiny_model().set_keep_bias(float("inf")), latency=False)
    assert everything.ratio == pytest.approx(1)
    assert everything.total_ratio > 1
    assert everything.to_json()["model"]["keep_bias"] == "inf"
    fewer = profiled(tiny_model().set_keep_bias(-0.5), latency=False)
    assert fewer.ratio < report.ratio


def test_the_model_is_as_it_was() -> None:
    model = tiny_model().set_execution("dense")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(*tiny_inputs(model)).sample
    profiled(model, dtype=torch.bfloat16)
    assert model.execution == "dense"
    assert model.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(*tiny_inputs(model)).sample, expected)


def test_progress_is_told_and_ends_whole() -> None:
    model = tiny_model()
    told: dict[str, tuple[int, int]] = {}

    def note(what: str, done: int, total: int) -> None:
        assert done >= told.get(what, (0, 0))[0]
        told[what] = (done, total)

    profile(model, SETTINGS, inputs=inputs_for(model), on_progress=note)
    assert set(told) == {"routing", "counting", "time and memory"}
    assert all(done == total for done, total in told.values())


def test_the_example_of_the_documentation_runs(repository: Path, own_folder: Path) -> None:
    page = (repository / "docs" / "profiling.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    folder = own_folder / "runs" / "trained"
    folder.mkdir(parents=True)
    save_model(tiny_model(sample_size=32, patch_size=8), folder)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/profiling.md", "exec"), names)
    assert 0 < names["report"].routed < macs_of(names["model"].geometry).routed


def test_the_documentation_names_every_key(report: ProfileReport, repository: Path) -> None:
    page = (repository / "docs" / "profiling.md").read_text(encoding="utf-8")
    missing = [key for key in report.to_json() if f"`{key}`" not in page]
    assert not missing
