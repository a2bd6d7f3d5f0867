"""Safetensors written tensor by tensor: read back by safetensors itself, in shards, and whole or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dydit_cli.artifacts.tensor_files import TensorPlan, shard_bytes, write_tensors
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import TensorSpec
from dydit_cli.errors import DyditError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "small": torch.randn(3, generator=generator).bfloat16(),
        "order": torch.randperm(5, generator=generator),
        "matrix": torch.randn(4, 7, generator=generator).t(),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "eight": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False, True]),
    }


def plans(content: Mapping[str, Tensor]) -> list[TensorPlan]:
    return [
        TensorPlan(key, TensorSpec(tuple(value.shape), value.dtype), partial(content.__getitem__, key))
        for key, value in content.items()
    ]


def equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return set(actual) == set(expected) and all(
        actual[key].dtype == expected[key].dtype
        and torch.equal(actual[key].double(), expected[key].double())
        and actual[key].shape == expected[key].shape
        for key in expected
    )


def test_safetensors_reads_it(tmp_path: Path) -> None:
    assert write_tensors(tmp_path, plans(tensors())) == ["diffusion_pytorch_model.safetensors"]
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    assert equal(load_file(path), tensors())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_begins_at_a_multiple_of_its_item(tmp_path: Path) -> None:
    """Else a mapped file cannot be viewed as that type."""
    write_tensors(tmp_path, plans(tensors()))
    content = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for key, value in tensors().items():
        assert header[key]["data_offsets"][0] % value.dtype.itemsize == 0


def test_tensors_are_made_in_order_and_one_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def make(key: str) -> Tensor:
        made.append(key)
        return tensors()[key]

    lazy = [TensorPlan(plan.key, plan.spec, partial(make, plan.key)) for plan in plans(tensors())]
    seen: list[tuple[int, int]] = []
    write_tensors(
        tmp_path, lazy, on_progress=lambda done, total: seen.append((len(made), done * 100 // total))
    )
    assert made == list(tensors())
    assert [count for count, _ in seen] == list(range(1, len(made) + 1))
    assert seen[-1][1] == 100


def test_shards_and_their_index(tmp_path: Path) -> None:
    content = {f"t{index}": torch.full((300,), float(index)) for index in range(5)}
    names = write_tensors(tmp_path, plans(content), max_shard_size="2.5KB")
    assert names == [f"diffusion_pytorch_model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6000
    assert index["weight_map"]["t4"] == names[2]
    assert all((tmp_path / name).stat().st_size < 2500 + 500 for name in names)
    assert equal(open_checkpoint(tmp_path).tensors, content)


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    content = {"a": torch.zeros(10), "b": torch.zeros(1000), "c": torch.zeros(10)}
    assert len(write_tensors(tmp_path, plans(content), max_shard_size="1KB")) == 3


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise DyditError("No.", why="Because.", fix="Do not.")

    lazy = [*plans({"a": torch.zeros(3)}), TensorPlan("b", TensorSpec((1,), torch.float32), fail)]
    with pytest.raises(DyditError, match="No"):
        write_tensors(tmp_path, lazy)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_what_was_announced(tmp_path: Path) -> None:
    wrong = [TensorPlan("a", TensorSpec((2,), torch.float32), lambda: torch.zeros(3))]
    with pytest.raises(ValueError, match="a: "):
        write_tensors(tmp_path, wrong)


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    huge = [TensorPlan("a", TensorSpec((10**15,), torch.float32), lambda: torch.zeros(1))]
    with pytest.raises(DyditError, match=r"4000000\.00 GB"):
        write_tensors(tmp_path, huge)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2KB", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["5", "5GiB", "-1GB", "GB", "200B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(DyditError, match="not a shard size"):
        shard_bytes(text)
