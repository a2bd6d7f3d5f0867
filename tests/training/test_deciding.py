"""Who decides: which routers learn, what the others do, and that it stands in the artifact's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dydit_cli
from dydit_cli.artifacts import load_for_training
from dydit_cli.data import open_data
from dydit_cli.dynamic.gates import ThresholdGating
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import executed_ratio, ratio_floor
from dydit_cli.objectives import HeldOutDraws, measure, objective_of
from dydit_cli.training import fine_tune, prepare
from dydit_cli.training.deciding import Beginning, deciding_named, least_ratio, routers_of, share_for
from tests.tiny import each_trained_family, tiny_model, uniform_routing
from tests.training.runs import settings_for

LONG = {"steps": 8, "router_learning_rate": 0.5, "evaluate_every": 0}


def begun(folder: Path, name: str, ratio: float = 0.5) -> tuple[DynamicModel, Beginning]:
    """A model whose routers were set by a way to decide."""
    settings = settings_for(folder)
    model = load_for_training(settings.model)
    split = open_data(settings.data, geometry=model.geometry)
    beginning = Beginning(model, split.train, objective_of(model), ratio, 0)
    deciding_named(name).begin(beginning)
    return model, beginning


def test_the_method_changes_nothing(tmp_path: Path) -> None:
    model, _ = begun(tmp_path, "learned")
    stored = dydit_cli.load_model(tmp_path / "c-dit").state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.router_parameters())


@pytest.mark.parametrize(("name", "learns"), [("width", True), ("tokens", False)])
def test_one_kind_alone_learns_and_the_other_stays_on(name: str, learns: bool, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, routers=name, target_ratio=0.7, **LONG)
    result = fine_tune(settings)
    before, after = dydit_cli.load_model(settings.model), dydit_cli.load_model(result.out)
    stored = before.state_dict()
    for router, module, of_width in routers_of(after):
        values = torch.cat([parameter.flatten() for parameter in module.parameters()])
        was = torch.cat([stored[f"{router}.{part}"].flatten() for part, _ in module.named_parameters()])
        if of_width == learns:
            assert not torch.equal(values, was)
        else:
            assert set(values.tolist()) == {0.0, 100.0}
    kept = (result.tokens,) if learns else (result.heads, result.groups)
    assert set(kept) == {1.0}
    assert result.trained_ratio is not None
    assert result.trained_ratio < 1


@each_trained_family
@pytest.mark.parametrize("name", ["learned", "width", "tokens"])
def test_the_floor_is_what_the_least_routing_of_those_that_decide_executes(family: object, name: str) -> None:
    geometry = tiny_model(family).geometry  # type: ignore[arg-type]
    deciding = deciding_named(name)
    least = uniform_routing(
        geometry,
        1,
        **({"heads": 1, "groups": 1} if deciding.width else {}),
        **({"tokens": 0} if deciding.tokens else {}),
    )
    if geometry.has_context and not deciding.width:
        full = uniform_routing(geometry, 1)
        assert least.blocks[0].heads.shape == full.blocks[0].heads.shape
    assert least_ratio(deciding, geometry) == pytest.approx(float(executed_ratio(least, geometry)), rel=1e-6)
    assert least_ratio(deciding, geometry) >= ratio_floor(geometry) - 1e-9


def test_a_target_below_the_floor_of_tokens_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="cannot be reached"):
        prepare(settings_for(tmp_path, routers="tokens", target_ratio=0.2))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_random_decisions_execute_the_target(ratio: float, tmp_path: Path) -> None:
    model, beginning = begun(tmp_path, "random", ratio)
    draws = HeldOutDraws(beginning.source, beginning.objective)
    found = measure(model, draws)
    assert found.ratio == pytest.approx(ratio, abs=0.05)
    assert not any(parameter.requires_grad for parameter in model.router_parameters())
    share = share_for(model.geometry, ratio)
    assert found.heads == pytest.approx(share, abs=0.1)
    assert found.tokens == pytest.approx(share, abs=0.1)


def test_random_decisions_are_those_of_the_seed_and_differ_from_unit_to_unit(tmp_path: Path) -> None:
    first, beginning = begun(tmp_path, "random")
    again, _ = begun(tmp_path, "random")
    other = load_for_training(tmp_path / "c-dit")
    deciding_named("random").begin(replace(beginning, model=other, seed=1))
    times = beginning.objective.grid(50)
    masks = [model.routing(times).heads for model in (first, again, other)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    routed = masks[0][:, :, 1:]
    assert 0 < float(routed.mean()) < 1
    assert float(routed.mean(dim=0).std()) < 0.1
    assert not torch.equal(routed[:, 0, 0], routed[:, 0, 1])


def test_random_routers_learn_nothing_while_the_rest_does(tmp_path: Path) -> None:
    settings = settings_for(
        tmp_path,
        routers="random",
        gating="annealed",
        anneal_steps=0,
        full_width_steps=0,
        ramp_steps=0,
        calibrate=True,
    )
    expected, _ = begun(tmp_path, "random", settings.target_ratio)
    result = fine_tune(settings)
    found = dydit_cli.load_model(result.out)
    before, stored = expected.state_dict(), found.state_dict()
    weights = [name for name in stored if "_router." in name and name.endswith("weight")]
    assert weights
    assert all(torch.equal(stored[name], before[name]) for name in weights)
    assert not torch.equal(stored["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    assert result.trained_ratio == pytest.approx(settings.target_ratio, abs=0.07)
    sample, labels = found.example_inputs(3, 0)
    times = torch.tensor([10.0, 500.0, 900.0])
    with torch.no_grad():
        outputs = [
            found.set_execution(name).denoise(sample, times, labels, gating=ThresholdGating())[0]
            for name in ("dense", "compact")
        ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_a_run_with_random_routers_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = fine_tune(settings_for(tmp_path, routers="random"))
    stopped = prepare(settings_for(tmp_path, routers="random", out=str(tmp_path / "r")))
    for report in stopped.steps(should_stop=lambda: stopped.done >= 3):
        assert report.step <= 4
    resumed = fine_tune(settings_for(tmp_path, routers="random", out=str(tmp_path / "r"), resume=True))
    states = [dydit_cli.load_model(result.out).state_dict() for result in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_other_names_and_other_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="did you mean 'random'"):
        prepare(settings_for(tmp_path, routers="rondom"))
    model = tiny_model("flux")
    with pytest.raises(DyditError, match="DiT's form"):
        deciding_named("random").begin(Beginning(model, None, None, 0.5, 0))  # type: ignore[arg-type]
