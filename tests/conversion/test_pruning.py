"""Static pruning: what is cut out, that it equals multiplying by zero, its cost, and its way through the chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydit_cli
from dydit_cli.conversion.convert import convert
from dydit_cli.dynamic.gates import ImposedGating, ThresholdGating
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompiledStaticExecutor, DenseExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.flops import count_macs
from dydit_cli.objectives import objective_of
from dydit_cli.recipe.schema import ExportSection
from dydit_cli.training import fine_tune
from tests.export.artifacts import converted, exported, static_checkpoint
from tests.tiny import orders, relative_difference, tiny_inputs, tiny_model
from tests.training.runs import settings_for

EACH = pytest.mark.parametrize("family", ["dit", "sit"])


def pruned(folder: Path, family: str = "dit", **options: Any) -> tuple[DynamicModel, dict[str, Any]]:
    """A tiny checkpoint cut to half, and its report."""
    if not folder.with_suffix(".pt").exists():
        static_checkpoint(folder.with_suffix(".pt"), family)
    settings: dict[str, Any] = {"prune": 0.5, "num_heads": 6} | options
    convert(folder.with_suffix(".pt"), out=folder, family=family, **settings)
    return dydit_cli.load_model(folder), json.loads((folder / "report.json").read_text())


@EACH
@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_it_equals_the_dense_model_with_these_masks_imposed(
    family: str, importance: str, tmp_path: Path
) -> None:
    """Against the dynamic model of the same weights whose groups are single channels: nothing of pruning's own is used."""
    model, report = pruned(tmp_path / "p", family, importance=importance)
    dense = tiny_model(family, num_groups=192)
    for order in orders(dense).values():
        order.copy_(torch.arange(len(order)))
    static = torch.load(tmp_path / "p.pt", weights_only=True)
    assert set(dense.load_state_dict(static, strict=False).unexpected_keys) == set()
    scores = load_file(tmp_path / "p" / "importance.safetensors")
    sample, times, labels = tiny_inputs(model)
    blocks = []
    for block, (heads, hidden) in enumerate(
        zip(report["pruning"]["heads"], report["pruning"]["hidden"], strict=True)
    ):
        assert sorted(scores["head_scores"][block].topk(len(heads)).indices.tolist()) == heads
        best = scores["channel_scores"][block].topk(hidden).indices
        rows = (len(sample), -1)
        blocks.append(
            BlockRouting(
                torch.zeros(6).index_fill(0, torch.tensor(heads), 1).expand(rows),
                torch.zeros(192).index_fill(0, best, 1).expand(rows),
                torch.ones(len(sample), model.geometry.num_tokens),
            )
        )
    with torch.no_grad():
        expected, _ = dense.denoise(
            sample, times, labels, executor=DenseExecutor(), gating=ImposedGating(Routing(tuple(blocks)))
        )
        for execution in ("static", "compact", "dense"):
            found, routing = model.set_execution(execution).denoise(sample, times, labels)
            assert relative_difference(found, expected) < 1e-5
            assert float(routing.heads.mean()) == float(routing.tokens.mean()) == 1
    assert report["verification"]["dense"] < 1e-5


@EACH
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_it_costs_what_was_asked_for(family: str, ratio: float, tmp_path: Path) -> None:
    model, report = pruned(tmp_path / "p", family, prune=ratio)
    before, after = count_macs(tiny_model(family)), count_macs(model)
    assert after.routed / before.routed == pytest.approx(ratio, rel=0.01)
    assert report["pruning"]["ratio"] == after.routed / before.routed
    assert after.routers == count_macs(model, model.routing(0.5)).routers == 0
    sample, times, labels = tiny_inputs(model, 4)
    for execution in ("static", "compact"):
        model.set_execution(execution)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _, routing = model.denoise(sample, times, labels)
        assert counter.get_total_flops() / 2 / 4 == pytest.approx(after.total_without_layernorm, rel=1e-3)
        assert count_macs(model, routing).total == after.total


def test_rounding_of_heads_is_made_up_by_channels(tmp_path: Path) -> None:
    _, report = pruned(tmp_path / "p", prune=0.6)
    assert [len(heads) for heads in report["pruning"]["heads"]] == [4, 4, 4]
    assert set(report["pruning"]["hidden"]) == {report["pruning"]["hidden"][0]}
    assert report["pruning"]["hidden"][0] < 0.6 * 192


def test_a_plan_and_compiled_blocks_serve_it(tmp_path: Path) -> None:
    model, _ = pruned(tmp_path / "p")
    sample, _, labels = tiny_inputs(model)
    times = torch.full((len(sample),), 500.0)
    with torch.no_grad():
        expected = model(sample, times, labels).sample
        model.plan([500.0], labels.tolist())
        assert relative_difference(model(sample, times, labels).sample, expected) < 1e-5
        executor = CompiledStaticExecutor(backend="eager")
        found, _ = model.denoise(sample, times, labels, executor=executor, gating=ThresholdGating())
    assert relative_difference(found, expected) < 1e-5
    with pytest.raises(DyditError, match="Choose static execution"):
        model.set_execution("compact", compile=True)


def test_it_is_fine_tuned_as_any_static_model(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, target_ratio=1.0)
    source = dydit_cli.load_model(settings.model)
    static_checkpoint_of(source, tmp_path / "s.pt")
    convert(
        tmp_path / "s.pt", out=tmp_path / "p", family="dit", num_heads=source.geometry.num_heads, prune=0.5
    )
    settings = settings.model_copy(update={"model": str(tmp_path / "p")})
    result = fine_tune(settings)
    assert result.ratio == 1
    before, after = dydit_cli.load_model(tmp_path / "p"), dydit_cli.load_model(result.out)
    assert after.geometry == before.geometry
    weights = [model.state_dict()["blocks.0.attn.qkv.weight"] for model in (before, after)]
    assert not torch.equal(*weights)
    with pytest.raises(DyditError, match="no routers"):
        fine_tune(settings.model_copy(update={"target_ratio": 0.5, "out": tmp_path / "other"}))


def static_checkpoint_of(model: DynamicModel, path: Path) -> None:
    """Write the static part of a model."""
    state = model.state_dict()
    torch.save(
        {key: value for key, value in state.items() if "_router." not in key and not key.endswith("_order")},
        path,
    )


def test_taylor_ranks_it_too(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    source = dydit_cli.load_model(settings.model)
    static_checkpoint_of(source, tmp_path / "s.pt")
    report = convert(
        tmp_path / "s.pt",
        out=tmp_path / "p",
        family="dit",
        num_heads=source.geometry.num_heads,
        prune=0.5,
        importance="taylor",
        importance_samples=16,
        data=settings.data,
    )
    assert report.importance == "taylor"
    assert report.pruning is not None
    assert report.pruning.ratio == pytest.approx(0.5, rel=0.02)


@EACH
def test_its_export_carries_its_code(family: str, tmp_path: Path) -> None:
    pruned(tmp_path / "p", family)
    report = exported(tmp_path / "p", tmp_path / "x")
    assert report.max_difference == 0
    loaded = dydit_cli.load_model(tmp_path / "x", convention="native")
    assert loaded.geometry.block_heads == (3, 3, 3)
    assert "class PrunedDiTBlock" in (tmp_path / "x" / "transformer" / "modeling_dydit.py").read_text()


@pytest.mark.parametrize("kind", ["static", "original"])
def test_the_original_layout_has_no_blocks_of_their_own_width(kind: str, tmp_path: Path) -> None:
    pruned(tmp_path / "p")
    with pytest.raises(DyditError, match="--format diffusers"):
        exported(tmp_path / "p", tmp_path / "x", kind)
    assert ExportSection(model="m", out=tmp_path).format == "diffusers"


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    static_checkpoint(tmp_path / "p.pt")
    with pytest.raises(DyditError, match=r"cannot be pruned to 0\.01"):
        pruned(tmp_path / "p", prune=0.01)
    with pytest.raises(DyditError, match="Leave width out"):
        pruned(tmp_path / "p", width="ordered")
    static_checkpoint(tmp_path / "latte.pt", "latte")
    with pytest.raises(DyditError, match="A Latte cannot be pruned"):
        pruned(tmp_path / "latte", "latte")
    parity = Path(__file__).parent.parent / "parity" / "dydit_official_tiny" / "checkpoint.pt"
    with pytest.raises(DyditError, match="dynamic already"):
        convert(parity, out=tmp_path / "d", num_heads=6, prune=0.5)
    assert not (tmp_path / "p").exists()


def test_a_configuration_that_does_not_fit_is_refused() -> None:
    for heads, hidden in (([3, 3], [9, 9]), ([3, 3, 7], [9, 9, 9]), ([3, 3, 3], None)):
        with pytest.raises(DyditError, match="do not fit"):
            tiny_model("dit", block_heads=heads, block_hidden=hidden)


def test_a_dynamic_model_is_what_it_was(tmp_path: Path) -> None:
    converted(tmp_path / "c")
    model = dydit_cli.load_model(tmp_path / "c")
    assert (model.geometry.is_pruned, model.config["block_heads"]) == (False, None)
    assert objective_of(model) is not None
