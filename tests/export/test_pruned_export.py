"""The static model of one timestep's width: what the dynamic model computes there with all tokens on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline

from dydit_cli.artifacts import load_model
from dydit_cli.dynamic.gates import ImposedGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import DenseExecutor
from dydit_cli.export.registration import register
from dydit_cli.flops import macs_of
from tests.export.artifacts import exported, trained
from tests.tiny import relative_difference, tiny_inputs

each_family = pytest.mark.parametrize(("family", "t"), [("dit", 300.0), ("sit", 0.3)])


@each_family
@torch.no_grad()
def test_it_is_the_dynamic_model_there(family: str, t: float, tmp_path: Path) -> None:
    path = trained(tmp_path / "t", family, in_channels=1)
    report = exported(path, tmp_path / "e", "pruned", timestep=t)
    assert report.max_difference < 1e-5
    dynamic = load_model(path, execution="dense")
    pruned = load_model(tmp_path / "e", convention="native")
    assert not [key for key in pruned.state_dict() if "router" in key]
    routing = dynamic.routing(t)
    assert list(pruned.config["block_heads"]) == [int(block.heads.sum()) for block in routing.blocks]
    sample, _, labels = tiny_inputs(dynamic, 2)
    imposed = ImposedGating(routing.map(lambda mask: mask.expand(2, -1)))
    expected, _ = dynamic.denoise(sample, t, labels, executor=DenseExecutor(), gating=imposed)
    assert relative_difference(pruned.denoise(sample, t, labels)[0], expected) < 1e-5
    assert macs_of(pruned.geometry).routed == pytest.approx(macs_of(dynamic.geometry, routing).routed)


def test_the_card_s_code_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    exported(trained(tmp_path / "t", in_channels=1), tmp_path / "e", "pruned", timestep=0)
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    assert "static DiT that a dynamic one is at the timestep 0" in card
    assert "keep_bias" not in card
    monkeypatch.chdir(tmp_path)
    code = next(part for part in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "load_model" in part)
    names: dict[str, object] = {}
    exec(compile(code.replace("num_inference_steps=50", "num_inference_steps=2"), "card", "exec"), names)
    assert isinstance(names["pipeline"], DiTPipeline)


def test_a_budget_decides_its_width(tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1, budgets=[0.3, 1.0], default_budget=0.4)
    widths = []
    for budget in (0.4, 1.0):
        exported(model, tmp_path / str(budget), "pruned", timestep=500, budget=budget)
        config = load_model(tmp_path / str(budget)).config
        blocks = load_model(model, budget=budget).routing(500.0).blocks
        assert list(config["block_heads"]) == [int(block.heads.sum()) for block in blocks]
        assert list(config["block_hidden"]) == [32 * int(block.groups.sum()) for block in blocks]
        assert config["budgets"] is None
        widths.append((*config["block_heads"], *config["block_hidden"]))
    assert widths[0] != widths[1]


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("dit", {}, {}, "needs a timestep"),
        ("dit", {}, {"timestep": 1000}, "no timestep 1000"),
        ("sit", {}, {"timestep": 2}, "no timestep 2"),
        ("dit", {}, {"timestep": 5, "steps": 3}, "takes no --steps"),
        ("latte", {"in_channels": 4}, {"timestep": 5}, "does not take a Latte"),
        ("dit", {"td_lora": {"rank": 2, "experts": 2}}, {"timestep": 5}, "TD-LoRA"),
    ],
)
def test_wrong_settings(
    family: str, changes: dict[str, object], settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    model = trained(tmp_path / "t", family, **({"in_channels": 1} | changes))
    with pytest.raises(DyditError, match=message):
        exported(model, tmp_path / "e", "pruned", **settings)
    assert not (tmp_path / "e").exists()


def test_a_block_without_any_unit_is_refused(tmp_path: Path) -> None:
    path = trained(tmp_path / "t", in_channels=1, always_on=False)
    model = load_model(path)
    model.blocks[1].head_router.linear.bias.fill_(-1e6)
    model.save_pretrained(str(path))
    with pytest.raises(DyditError, match="Block 1 runs no head"):
        exported(path, tmp_path / "e", "pruned", timestep=500)
