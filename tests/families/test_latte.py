"""Latte: outputs of the original in every execution, its two kinds of block, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.dynamic.gates import ThresholdGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import EXECUTIONS, CompactExecutor, DenseExecutor
from dydit_cli.families.family import Hints
from dydit_cli.families.latte import DyLatteTransformer3DModel
from dydit_cli.families.registry import FAMILIES, family_named, preset_named
from dydit_cli.flops import macs_of
from tests.tiny import relative_difference, tiny_inputs, tiny_model

CASES = Path(__file__).parent.parent / "parity"
CASE_NAMES = ("latte_tiny_class", "latte_tiny_uncond")
TOLERANCE = 2e-5
each_case = pytest.mark.parametrize("name", CASE_NAMES)


def load_case(name: str) -> tuple[DyLatteTransformer3DModel, dict[str, Tensor]]:
    """Read a case's checkpoint as a user would, and its inputs and outputs."""
    arguments: dict[str, Any] = json.loads((CASES / name / "case.json").read_text(encoding="utf-8"))["config"]
    checkpoint = read_checkpoint(CASES / name / "checkpoint.pt")
    assert checkpoint.copy == "ema"
    family = family_named("latte")
    assert [each.name for each in FAMILIES if each.recognises(checkpoint.tensors)] == ["latte"]
    source = family.read(checkpoint.tensors, Hints(num_heads=arguments["num_heads"]))
    assert source.config["num_frames"] == arguments["num_frames"]
    assert source.config["num_layers"] == arguments["depth"]
    assert source.config["num_classes"] == (arguments["num_classes"] if arguments["extras"] == 2 else 0)
    model = family.build(source.config)
    assert isinstance(model, DyLatteTransformer3DModel)
    missing, unexpected = model.load_state_dict(source.tensors, strict=False)
    assert not unexpected
    assert all("_router." in key or key.endswith("_order") for key in missing)
    return model.eval().requires_grad_(False), load_file(CASES / name / "io.safetensors")


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


@each_case
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_forward_of_the_original(name: str, execution: str) -> None:
    model, case = load_case(name)
    output = model.set_execution(execution)(case["x"], case["t"], class_labels=case.get("y")).sample
    assert difference(output, case["out"]) < TOLERANCE


@each_case
def test_a_shuffled_order_changes_nothing(name: str) -> None:
    model, case = load_case(name)
    generator = torch.Generator().manual_seed(0)
    for block in model.dynamic_blocks:
        block.attn.head_order.copy_(torch.randperm(6, generator=generator))
        block.mlp.channel_order.copy_(torch.randperm(192, generator=generator))
    for execution in EXECUTIONS:
        output = model.set_execution(execution)(case["x"], case["t"], case.get("y")).sample
        assert difference(output, case["out"]) < TOLERANCE


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_guided_forward_of_the_original(execution: str) -> None:
    """Scale 7 on the first four channels of axis 2; the other channels stay each branch's own."""
    model, case = load_case("latte_tiny_class")
    half = case["cfg_x"][: len(case["cfg_x"]) // 2]
    output = model.set_execution(execution)(torch.cat([half, half]), case["cfg_t"], case["cfg_y"]).sample
    conditional, unconditional = output[:, :, :4].chunk(2)
    guided = unconditional + 7 * (conditional - unconditional)
    whole = torch.cat([torch.cat([guided, guided]), output[:, :, 4:]], dim=2)
    assert difference(whole, case["cfg_out_scale7"]) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}], ids=["classes", "unconditional"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_dense_and_compact_agree(changes: dict[str, int], depth: int) -> None:
    """With routers that keep about half, planned and not, for any number of blocks."""
    model = tiny_model("latte", num_layers=depth, num_frames=3, **changes)
    images, times, _ = tiny_inputs(model) if not changes else (*tiny_videos(model), None)
    labels = model.example_inputs(len(images), 0)[1]
    dense, routing = model.denoise(images, times, labels, executor=DenseExecutor(), gating=ThresholdGating())
    assert 0.1 < float(routing.tokens.float().mean()) < 0.9
    executor = CompactExecutor()
    with torch.no_grad():
        first, _ = model.denoise(images, times, labels, executor=executor, gating=ThresholdGating())
        executor.make_plan(model, times, [int(labels[0])], ThresholdGating())
        planned, _ = model.denoise(images, times, labels, executor=executor, gating=ThresholdGating())
    assert relative_difference(first, dense) < 1e-5
    assert relative_difference(planned, dense) < 1e-5


def tiny_videos(model: DyLatteTransformer3DModel) -> tuple[Tensor, Tensor]:
    return torch.randn(3, *model.geometry.sample_shape), torch.tensor([10.0, 500.0, 990.0])


@torch.no_grad()
def test_a_frame_hears_of_others_in_temporal_blocks_only() -> None:
    """One block is spatial: frames are alone. Two blocks: every frame depends on every other."""
    for depth, alone in ((1, True), (2, False)):
        model = tiny_model("latte", num_layers=depth, num_frames=3).set_execution("static")
        videos, _ = tiny_videos(model)
        changed = videos.clone()
        changed[:, 0] += 1
        before, after = (model(each, 500.0).sample for each in (videos, changed))
        assert torch.equal(before[:, 1:], after[:, 1:]) is alone
        assert not torch.equal(before[:, 0], after[:, 0])


@torch.no_grad()
def test_the_frame_table_enters_at_the_first_temporal_block() -> None:
    """A model of one (spatial) block does not know which frame is which; deeper ones do."""
    for depth, knows in ((1, False), (2, True), (3, True)):
        model = tiny_model("latte", num_layers=depth, num_frames=3).set_execution("static")
        videos, _ = tiny_videos(model)
        swapped = model(videos.flip(1), 500.0).sample.flip(1)
        assert (relative_difference(swapped, model(videos, 500.0).sample) > 1e-3) is knows


def test_no_classes_no_null_class() -> None:
    model = tiny_model("latte", num_classes=0)
    assert not any(key.startswith("y_embedder") for key in model.state_dict())
    assert model.null_condition(2).tolist() == [0, 0]
    videos, _ = tiny_videos(model)
    with torch.no_grad():
        assert torch.equal(model(videos, 3.0).sample, model(videos, 3.0, torch.tensor([0, 5, 1000])).sample)


def test_text_conditioned_files_are_refused() -> None:
    tensors = dict(load_case("latte_tiny_class")[0].state_dict())
    tensors["text_embedding_projection.1.weight"] = torch.zeros(48, 59136)
    with pytest.raises(DyditError, match="text embeddings"):
        family_named("latte").read(tensors, Hints(num_heads=6))


def test_the_heads_of_other_widths_must_be_said() -> None:
    tensors = read_checkpoint(CASES / "latte_tiny_uncond" / "checkpoint.pt").tensors
    with pytest.raises(DyditError, match="heads"):
        family_named("latte").read(tensors, Hints())


def test_presets_are_the_published_sets() -> None:
    classes = {"xl/2": 101, "xl/2-ucf101": 101, "xl/2-ffs": 0, "xl/2-sky": 0, "xl/2-taichi": 0}
    for name, count in classes.items():
        family, config = preset_named(f"latte-{name}")
        assert family.name == "latte"
        assert config["num_classes"] == count
        with torch.device("meta"):
            model = family.build(config)
        assert model.geometry.sample_shape == (16, 4, 32, 32)
        static = sum(p.numel() for key, p in model.named_parameters() if "_router." not in key)
        # The counts of the original's classes, tables of positions included.
        assert static == (674_112_416 if count else 673_994_912)


def test_formula_of_the_published_size() -> None:
    """A frame of Latte-XL/2 costs a frame of DiT-XL/2, but for what temporal attention saves."""
    family, config = preset_named("latte-xl/2-ucf101")
    with torch.device("meta"):
        report = macs_of(family.build(config).geometry)
    tokens, channels = 16 * 256, 1152
    spatial, temporal = (4 * tokens * channels**2 + 2 * tokens * n * channels for n in (256, 16))
    assert report.attention == 14 * (spatial + temporal)
    assert report.mlp == 28 * 8 * tokens * channels**2


@pytest.mark.slow
def test_fvcore_counts_the_published_size() -> None:
    """At full width and two blocks, one of each kind; the depth only multiplies."""
    counting = pytest.importorskip("fvcore.nn")
    assert counting
    from dydit_cli.profiling.counting import count_static

    family, config = preset_named("latte-xl/2-ucf101")
    model = family.build({**config, "num_layers": 2}).eval()
    videos, labels = model.example_inputs(1, 0)
    counted = count_static(model, videos, torch.tensor([500.0]), labels)
    assert counted.fvcore == pytest.approx(macs_of(model.geometry).total, rel=1e-3)
