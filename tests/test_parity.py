"""Outputs of the original implementations (facebookresearch/DiT, willisma/SiT, the authors' dynamic DiT) in every execution.

The cases hold a checkpoint as users of the original have it, and inputs and outputs computed by the original in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.dynamic.gates import CompleteGating, ImposedGating, ThresholdGating
from dydit_cli.execution import EXECUTIONS, CompactExecutor, DenseExecutor, executor_named
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Hints
from dydit_cli.families.registry import family_named
from tests.tiny import routing_of

CASES = Path(__file__).parent / "parity"
TOLERANCE = 2e-5


def load_case(
    name: str, family: str, tensors: dict[str, Tensor] | None = None
) -> tuple[DynamicTransformer, dict[str, Tensor]]:
    """Read a case's checkpoint as a user would, and its inputs and outputs."""
    arguments: dict[str, Any] = json.loads((CASES / name / "case.json").read_text(encoding="utf-8"))["config"]
    if tensors is None:
        tensors = read_checkpoint(CASES / name / "checkpoint.pt").tensors
    chosen = family_named(family)
    source = chosen.read(tensors, Hints(num_heads=arguments["num_heads"]))
    assert source.config["sample_size"] == arguments["input_size"]
    assert source.config["num_layers"] == arguments["depth"]
    assert source.config["num_classes"] == arguments["num_classes"]
    assert source.config["learn_sigma"]
    model = chosen.build(source.config)
    missing, unexpected = model.load_state_dict(source.tensors, strict=False)
    assert not unexpected
    assert all(("_router." in key and not source.dynamic) or key.endswith("_order") for key in missing)
    return model.eval().requires_grad_(False), load_file(CASES / name / "io.safetensors")


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


@pytest.mark.parametrize(("name", "family"), [("dit_tiny", "dit"), ("sit_tiny", "sit")])
class TestStaticOriginals:
    @pytest.mark.parametrize("execution", EXECUTIONS)
    def test_forward(self, name: str, family: str, execution: str) -> None:
        """Straight after conversion every unit is on: the routers' start decides it, not the test."""
        model, case = load_case(name, family)
        model.set_execution(execution)
        output = model(case["x"], case["t"], case["y"]).sample
        assert difference(output, case["out"]) < TOLERANCE

    def test_a_shuffled_order_changes_nothing(self, name: str, family: str) -> None:
        model, case = load_case(name, family)
        generator = torch.Generator().manual_seed(0)
        for block in model.blocks:
            block.attn.head_order.copy_(torch.randperm(6, generator=generator))
            block.mlp.channel_order.copy_(torch.randperm(192, generator=generator))
        for execution in EXECUTIONS:
            output = model.set_execution(execution)(case["x"], case["t"], case["y"]).sample
            assert difference(output, case["out"]) < TOLERANCE

    @pytest.mark.parametrize("execution", EXECUTIONS)
    def test_guided_forward(self, name: str, family: str, execution: str) -> None:
        """Scale 4 on the first three channels, as both originals do; the other channels stay each branch's own."""
        model, case = load_case(name, family)
        half = case["cfg_x"][: len(case["cfg_x"]) // 2]
        output = model.set_execution(execution)(torch.cat([half, half]), case["cfg_t"], case["cfg_y"]).sample
        conditional, unconditional = output[:, :3].chunk(2)
        guided = unconditional + 4 * (conditional - unconditional)
        assert (
            difference(torch.cat([torch.cat([guided, guided]), output[:, 3:]], dim=1), case["cfg_out_scale4"])
            < 1e-4
        )

    def test_the_other_original_differs(self, name: str, family: str) -> None:
        """The files look the same, so a test that passed with the wrong family would prove nothing."""
        model, case = load_case(name, "sit" if family == "dit" else "dit")
        output = model(case["x"], case["t"], case["y"]).sample
        assert output.shape != case["out"].shape


class TestAuthorsDynamicDiT:
    """Masks, masked outputs and complete outputs of the authors' released code."""

    @pytest.mark.parametrize("execution", ["dense", "compact"])
    def test_live_output_and_exact_masks(self, execution: str) -> None:
        model, case = load_case("dydit_official_tiny", "dit")
        output, routing = model.denoise(
            case["x"], case["t"], case["y"], executor=executor_named(execution), gating=ThresholdGating()
        )
        assert difference(output, case["out"]) < TOLERANCE
        assert torch.equal(routing.heads, case["attn_masks"])
        assert torch.equal(routing.groups, case["mlp_masks"])
        assert torch.equal(routing.tokens, case["token_masks"].squeeze(-1))

    def test_the_case_decides_both_ways(self) -> None:
        """Else equality of masks would say little."""
        case = load_file(CASES / "dydit_official_tiny" / "io.safetensors")
        for key in ("attn_masks", "mlp_masks", "token_masks"):
            assert 0.1 < float(case[key].mean()) < 0.9
        assert difference(case["out"], case["out_complete"]) > 0.01

    @pytest.mark.parametrize("execution", EXECUTIONS)
    def test_complete_output(self, execution: str) -> None:
        model, case = load_case("dydit_official_tiny", "dit")
        output, _ = model.denoise(
            case["x"], case["t"], case["y"], executor=executor_named(execution), gating=CompleteGating()
        )
        assert difference(output, case["out_complete"]) < TOLERANCE
        kept = (
            model.set_execution(execution).set_keep_bias(float("inf"))(case["x"], case["t"], case["y"]).sample
        )
        assert difference(kept, case["out_complete"]) < TOLERANCE

    @pytest.mark.parametrize("execution", ["dense", "compact"])
    def test_imposed_masks_of_the_file(self, execution: str) -> None:
        """The masks as the file gives them, so that the arithmetic is checked apart from the routers."""
        model, case = load_case("dydit_official_tiny", "dit")
        routing = routing_of(
            model.geometry, case["attn_masks"], case["mlp_masks"], case["token_masks"].squeeze(-1)
        )
        output, _ = model.denoise(
            case["x"], case["t"], case["y"], executor=executor_named(execution), gating=ImposedGating(routing)
        )
        assert difference(output, case["out"]) < TOLERANCE

    def test_orders_are_the_identity(self) -> None:
        model, _ = load_case("dydit_official_tiny", "dit")
        for block in model.blocks:
            assert torch.equal(block.attn.head_order, torch.arange(6))
            assert torch.equal(block.mlp.channel_order, torch.arange(192))


class TestOlderDynamicForm:
    """The release of December 2024: as many router rows as heads, and no always-on unit."""

    @staticmethod
    def older_form(first_bias: float) -> dict[str, Tensor]:
        """The official file with a row for unit 0 of every width router, of zero weight and the given bias."""
        tensors = dict(read_checkpoint(CASES / "dydit_official_tiny" / "checkpoint.pt").tensors)
        for key, tensor in tensors.items():
            if "_rate.router." in key:
                first = (
                    tensor.new_full((1,), first_bias)
                    if key.endswith("bias")
                    else torch.zeros_like(tensor[:1])
                )
                tensors[key] = torch.cat([first, tensor])
        return tensors

    @pytest.mark.parametrize("execution", ["dense", "compact"])
    def test_unit_0_kept_by_its_bias_gives_the_newer_output(self, execution: str) -> None:
        model, case = load_case("dydit_official_tiny", "dit", self.older_form(1.0))
        assert not model.geometry.always_on
        output, routing = model.denoise(case["x"], case["t"], case["y"], executor=executor_named(execution))
        assert difference(output, case["out"]) < TOLERANCE
        assert torch.equal(routing.heads, case["attn_masks"])
        assert torch.equal(routing.groups, case["mlp_masks"])

    def test_unit_0_can_be_off(self) -> None:
        model, case = load_case("dydit_official_tiny", "dit", self.older_form(-1.0))
        arguments = (case["x"], case["t"], case["y"])
        dense, routing = model.denoise(*arguments, executor=DenseExecutor())
        compact, live = model.denoise(*arguments, executor=CompactExecutor())
        assert not routing.heads[:, :, 0].any()
        assert not routing.groups[:, :, 0].any()
        assert torch.equal(routing.heads[:, :, 1:], case["attn_masks"][:, :, 1:])
        assert torch.equal(routing.heads, live.heads)
        assert difference(compact, dense) < 1e-5 * float(dense.abs().max())
        assert difference(dense, case["out"]) > 0.01

    def test_everything_can_be_off(self) -> None:
        model, case = load_case("dydit_official_tiny", "dit", self.older_form(1.0))
        model.set_keep_bias(float("-inf"))
        arguments = (case["x"], case["t"], case["y"])
        dense, routing = model.denoise(*arguments, executor=DenseExecutor())
        compact, _ = model.denoise(*arguments, executor=CompactExecutor())
        assert not routing.heads.any()
        assert not routing.groups.any()
        assert not routing.tokens.any()
        assert difference(compact, dense) < 1e-5 * float(dense.abs().max())
