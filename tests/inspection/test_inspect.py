"""What `dydit inspect` finds in files of every kind, and that it reads no weights to find it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dydit_cli.artifacts import save_model, write_manifest
from dydit_cli.cli.app import main
from dydit_cli.conversion.insertion import is_ours
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Hints
from dydit_cli.inspection.inspect import inspect
from dydit_cli.inspection.keys import grouped
from tests.tiny import tiny_model

HINTS = Hints(num_heads=6, axes_dims_rope=(2, 2, 4))


def static_tensors(family: str) -> dict[str, torch.Tensor]:
    """A tiny model's tensors in the original layout, without routers."""
    state = tiny_model(family, shuffled=False).state_dict()
    return {key: tensor.contiguous() for key, tensor in state.items() if not is_ours(key)}


@pytest.mark.parametrize(
    ("family", "families"), [("dit", ("dit", "sit")), ("latte", ("latte",)), ("flux", ("flux",))]
)
def test_a_static_file(family: str, families: tuple[str, ...], tmp_path: Path) -> None:
    tensors = static_tensors(family)
    save_file(tensors, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors", HINTS)
    assert found.problem is None
    assert found.families == families
    assert found.keys is not None
    assert (found.keys.total, found.keys.recognised) == (len(tensors), len(tensors))
    assert found.keys.lost == found.keys.missing == ()
    assert found.parameters["static"] == sum(tensor.numel() for tensor in tensors.values())
    assert found.parameters["routers"] > 0
    assert found.routers is None
    assert found.stored is not None
    assert found.stored.dtypes == {"float32": found.parameters["static"]}
    assert "dydit convert --checkpoint" in (found.next or "")


def test_keys_that_would_be_lost_and_that_are_missing(tmp_path: Path) -> None:
    tensors = static_tensors("dit")
    del tensors["blocks.1.attn.qkv.bias"]
    tensors["blocks.0.control.weight"] = tensors["blocks.1.control.weight"] = torch.zeros(3)
    torch.save(
        {"ema": tensors, "model": tensors, "opt": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "a.pt"
    )
    found = inspect(tmp_path / "a.pt", HINTS)
    assert found.keys is not None
    assert [(group.pattern, group.count) for group in found.keys.lost] == [("blocks.*.control.weight", 2)]
    assert [group.pattern for group in found.keys.missing] == ["blocks.*.attn.qkv.bias"]
    assert found.stored is not None
    assert found.stored.copy == "ema"
    assert [group.pattern for group in found.stored.beside] == ["model", "opt", "epoch"]


def test_the_numbers_of_a_file_are_not_read(tmp_path: Path) -> None:
    """A file whose numbers are a hole: as long as it should be, and cut off behind its header in what is really there."""
    path = tmp_path / "a.safetensors"
    save_file(static_tensors("dit"), path)
    whole, size = path.read_bytes(), path.stat().st_size
    header = 8 + int.from_bytes(whole[:8], "little")
    with path.open("wb") as file:
        file.write(whole[:header])
        file.truncate(size)
    found = inspect(path, HINTS)
    assert found.problem is None
    assert found.geometry["depth"] == 3


def test_unknown_heads_are_a_problem_and_no_failure(tmp_path: Path) -> None:
    save_file(static_tensors("dit"), tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert found.problem is not None
    assert "--num-heads" in found.problem["fix"]
    assert found.families == ("dit", "sit")


def test_a_file_of_no_family(tmp_path: Path) -> None:
    save_file({"encoder.0.weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert found.families == ()
    assert found.problem is not None


def test_an_artifact_and_its_past(tmp_path: Path) -> None:
    first, second = tmp_path / "c", tmp_path / "t"
    first.mkdir()
    second.mkdir()
    save_model(tiny_model("dit"), first)
    write_manifest(first, stage="convert", settings={"family": "dit"}, parent=tmp_path / "gone.pt")
    save_model(tiny_model("dit", seed=1, width="ordered"), second)
    settings = {"data": "D", "target_ratio": 0.5}
    write_manifest(
        second, stage="finetune", settings=settings, parent=first, results={"ratio": 0.51, "steps": 7}
    )
    found = inspect(second)
    assert (found.kind, found.stage, found.families) == ("artifact", "finetune", ("dit",))
    assert found.routers is not None
    assert found.routers.width == "ordered"
    assert found.facts["ratio"] == 0.51
    assert [(each.stage, each.state) for each in found.lineage] == [
        ("convert", "present"),
        ("checkpoint", "gone"),
    ]
    # A parent that was made anew since is not the one that this was made of.
    save_model(tiny_model("dit", seed=2), first)
    write_manifest(first, stage="convert", settings={"family": "dit"})
    assert inspect(second).lineage[0].state == "changed"
    # The weight file of an artifact is the artifact.
    assert inspect(second / "diffusion_pytorch_model.safetensors").stage == "finetune"


def test_an_artifact_with_a_missing_tensor(tmp_path: Path) -> None:
    save_model(tiny_model("dit"), tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del tensors["blocks.0.head_router.linear.weight"]
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    found = inspect(tmp_path)
    assert found.keys is not None
    assert [group.pattern for group in found.keys.missing] == ["blocks.*.head_router.linear.weight"]


def test_an_adapter_file(tmp_path: Path) -> None:
    layers = [f"transformer.transformer_blocks.{index}.attn.to_q" for index in range(3)]
    tensors = {f"{layer}.lora_A.weight": torch.zeros(4, 8) for layer in layers}
    tensors |= {f"{layer}.lora_B.weight": torch.zeros(8, 4) for layer in layers}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = inspect(tmp_path / "lora.safetensors")
    (adapter,) = found.adapters
    assert (adapter.kind, adapter.names, adapter.rank, adapter.layers) == ("lora", "diffusers", 4, 3)
    assert adapter.parameters == 3 * 64


def test_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_10").mkdir(parents=True)
    assert inspect(tmp_path).kind == "unfinished run"


def test_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="nothing at"):
        inspect(tmp_path / "a")


def test_keys_are_grouped_by_their_numbers() -> None:
    groups = grouped(["a.0.norm1.w", "a.11.norm1.w", "b"])
    assert [(group.pattern, group.count) for group in groups] == [("a.*.norm1.w", 2), ("b", 1)]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "builtin:dit_fmnist"]) == 0
    out, err = capsys.readouterr()
    for expected in ("a static checkpoint", "dit, original layout", "6 blocks of 128 channels", "all used"):
        assert expected in out
    assert "next: dydit convert --checkpoint builtin:dit_fmnist --family dit" in err


def test_the_command_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "builtin:flux_fmnist", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["families"] == ["flux"]
    assert found["problem"] is None
    assert found["parameters"]["static"] > 0
