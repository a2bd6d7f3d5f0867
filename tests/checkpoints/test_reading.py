"""Containers of weights as users have them: flat, wrapped, prefixed, sharded; which copy is taken, and what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError

PARITY = Path(__file__).parent.parent / "parity"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "blocks.0.attn.qkv.weight": torch.randn(6, 2),
        "pos_embed": torch.randn(1, 4, 2),
        "count": torch.tensor(3),
    }


def scaled(tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {key: tensor * factor for key, tensor in tensors.items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(actual) == set(expected) and all(torch.equal(actual[key], expected[key]) for key in expected)


NAMESPACE = argparse.Namespace(
    model="DiT-XL/2", lr=1e-4, nested=argparse.Namespace(seed=0), betas=(0.9, 0.999)
)


class TestContainers:
    def test_flat_file(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        torch.save(tensors, tmp_path / "a.pt")
        read = read_checkpoint(tmp_path / "a.pt")
        assert same(read.tensors, tensors)
        assert (read.path, read.copy, read.container) == (tmp_path / "a.pt", "", "torch")

    def test_training_file_gives_the_average(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        """What DiT's train.py saves, its argparse namespace included; the EMA is what its authors evaluate."""
        optimiser = {
            "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(6, 2)}},
            "param_groups": [{"lr": 1e-4}],
        }
        content = {"model": tensors, "ema": scaled(tensors, 2), "opt": optimiser, "args": NAMESPACE}
        torch.save(content, tmp_path / "0050000.pt")
        read = read_checkpoint(str(tmp_path / "0050000.pt"))
        assert read.copy == "ema"
        assert same(read.tensors, scaled(tensors, 2))

    @pytest.mark.parametrize(
        ("names", "chosen"),
        [
            (["model"], "model"),
            (["module"], "module"),
            (["state_dict"], "state_dict"),
            (["state_dict", "model", "ema"], "ema"),
            (["module", "model"], "model"),
        ],
    )
    def test_wrappers_in_their_order(
        self, tmp_path: Path, tensors: dict[str, Tensor], names: list[str], chosen: str
    ) -> None:
        torch.save({name: scaled(tensors, index + 1) for index, name in enumerate(names)}, tmp_path / "a.pt")
        read = read_checkpoint(tmp_path / "a.pt")
        assert read.copy == chosen
        assert same(read.tensors, scaled(tensors, names.index(chosen) + 1))

    @pytest.mark.parametrize("empty", [None, {}, {"decay": 0.99}, 3])
    def test_an_average_without_tensors_is_passed_over(
        self, tmp_path: Path, tensors: dict[str, Tensor], empty: Any
    ) -> None:
        torch.save({"ema": empty, "model": tensors, "epoch": 3}, tmp_path / "a.pt")
        assert read_checkpoint(tmp_path / "a.pt").copy == "model"

    @pytest.mark.parametrize(
        "prefix",
        ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.diffusion_model."],
    )
    def test_prefixes_of_wrappers_go(self, tmp_path: Path, tensors: dict[str, Tensor], prefix: str) -> None:
        prefixed = {prefix + key: tensor for key, tensor in tensors.items()}
        torch.save({"ema": prefixed}, tmp_path / "a.pt")
        save_file(prefixed, tmp_path / "a.safetensors")
        assert same(read_checkpoint(tmp_path / "a.pt").tensors, tensors)
        assert same(read_checkpoint(tmp_path / "a.safetensors").tensors, tensors)

    def test_a_prefix_of_some_keys_stays(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        mixed = {"module.weight": torch.ones(2), **tensors}
        torch.save(mixed, tmp_path / "a.pt")
        assert same(read_checkpoint(tmp_path / "a.pt").tensors, mixed)

    def test_a_state_dict_and_parameters(self, tmp_path: Path) -> None:
        layer = nn.Linear(2, 3)
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        torch.save(OrderedDict(layer.named_parameters()), tmp_path / "parameters.pt")
        for name in ("state.pt", "parameters.pt"):
            read = read_checkpoint(tmp_path / name).tensors
            assert torch.equal(read["weight"], layer.weight)
            assert set(read) == {"weight", "bias"}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
    def test_types_are_kept(self, tmp_path: Path, dtype: torch.dtype) -> None:
        torch.save({"a": torch.ones(3).to(dtype)}, tmp_path / "a.pt")
        save_file({"a": torch.ones(3).to(dtype)}, tmp_path / "a.safetensors")
        assert read_checkpoint(tmp_path / "a.pt").tensors["a"].dtype == dtype
        assert read_checkpoint(tmp_path / "a.safetensors").tensors["a"].dtype == dtype

    @pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.bin", "a.PT", "weights"])
    def test_other_suffixes_of_torch_files(
        self, tmp_path: Path, tensors: dict[str, Tensor], name: str
    ) -> None:
        torch.save(tensors, tmp_path / name)
        assert same(read_checkpoint(tmp_path / name).tensors, tensors)

    def test_the_older_container_of_torch(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        torch.save(
            {"ema": tensors, "args": NAMESPACE}, tmp_path / "a.pt", _use_new_zipfile_serialization=False
        )
        assert same(read_checkpoint(tmp_path / "a.pt").tensors, tensors)

    def test_the_cases_of_the_originals(self) -> None:
        assert read_checkpoint(PARITY / "dit_tiny" / "checkpoint.pt").copy == ""
        assert read_checkpoint(PARITY / "dydit_official_tiny" / "checkpoint.pt").copy == "ema"


class TestFolders:
    @staticmethod
    def shards(folder: Path, tensors: dict[str, Tensor], name: str = "diffusion_pytorch_model") -> Path:
        weight_map = {}
        for number, (key, tensor) in enumerate(tensors.items(), 1):
            file = f"{name}-{number:05}-of-{len(tensors):05}.safetensors"
            save_file({key: tensor}, folder / file)
            weight_map[key] = file
        index = folder / f"{name}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        return index

    @pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model"])
    def test_shards(self, tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
        self.shards(tmp_path, tensors, name)
        read = read_checkpoint(tmp_path)
        assert same(read.tensors, tensors)
        assert read.container == "safetensors"

    def test_one_file_of_any_name(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        torch.save({"model": tensors}, tmp_path / "0050000.pt")
        (tmp_path / "config.json").write_text("{}")
        assert read_checkpoint(tmp_path).copy == "model"

    def test_the_usual_name_among_others(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
        save_file(scaled(tensors, 2), tmp_path / "importance.safetensors")
        assert same(read_checkpoint(tmp_path).tensors, tensors)

    def test_several_files_are_not_guessed_among(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        for name in ("a.pt", "b.pt"):
            torch.save(tensors, tmp_path / name)
        with pytest.raises(DyditError, match=r"a\.pt, b\.pt"):
            read_checkpoint(tmp_path)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DyditError, match="does not hold one checkpoint"):
            read_checkpoint(tmp_path)

    def test_a_missing_shard_is_named(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        self.shards(tmp_path, tensors)
        (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
        with pytest.raises(DyditError, match=r"00002-of-00003\.safetensors is missing"):
            read_checkpoint(tmp_path)

    def test_a_shard_cut_short(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        self.shards(tmp_path, tensors)
        shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-3])
        with pytest.raises(DyditError, match=r"00002-of-00003\.safetensors cannot be read"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "{}",
            "3",
            '{"weight_map": 3}',
            '{"weight_map": ["a"]}',
            '{"weight_map": {"a": ["b"]}}',
            '{"weight_map": {"a": null, "b": "c"}}',
            '{"weight_map": {}}',
            "\xff\xfe",
        ],
    )
    def test_a_damaged_index(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DyditError):
            read_checkpoint(tmp_path)

    def test_an_index_does_not_lead_out_of_its_folder(
        self, tmp_path: Path, tensors: dict[str, Tensor]
    ) -> None:
        inside = tmp_path / "inside"
        inside.mkdir()
        save_file(tensors, tmp_path / "secret.safetensors")
        index = {"weight_map": {"pos_embed": "../secret.safetensors"}}
        (inside / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(DyditError, match="missing"):
            read_checkpoint(inside)


class TestDamage:
    @staticmethod
    def refused(path: Path) -> DyditError:
        with pytest.raises(DyditError) as error:
            read_checkpoint(path)
        assert str(path) in error.value.what
        assert error.value.why
        assert error.value.fix
        return error.value

    def test_missing(self, tmp_path: Path) -> None:
        assert "no checkpoint" in self.refused(tmp_path / "nothing.pt").what

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
    def test_empty_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        assert "0 bytes" in self.refused(tmp_path / name).why

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    @pytest.mark.parametrize(
        "content", [b"\x00" * 64, b"<html>404</html>", b"PK\x03\x04", b"version https://git-lfs.github.com"]
    )
    def test_something_else_under_the_name(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        self.refused(tmp_path / name)

    def test_wrong_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("hello")
        assert "'.txt'" in self.refused(tmp_path / "a.txt").why

    @pytest.mark.parametrize(
        "content", [[1, 2], "text", 3, None, {"a": 1}, {"model": {"a": 1}}, {}, NAMESPACE]
    )
    def test_no_tensors(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "a.pt")
        assert "holds no weights" in self.refused(tmp_path / "a.pt").what

    def test_a_bare_tensor(self, tmp_path: Path) -> None:
        torch.save(torch.ones(3), tmp_path / "a.pt")
        assert "Tensor" in self.refused(tmp_path / "a.pt").why

    def test_no_tensors_in_safetensors(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "a.safetensors")
        assert "holds no weights" in self.refused(tmp_path / "a.safetensors").what

    def test_a_folder_named_like_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.pt").mkdir()
        self.refused(tmp_path / "a.pt")

    @pytest.mark.parametrize("name", ["new.pt", "old.pt", "a.safetensors"])
    def test_cut_anywhere(self, tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
        """From the first byte to the last but one, in about 60 places."""
        whole = tmp_path / name
        if name == "a.safetensors":
            save_file(tensors, whole)
        else:
            content = {"ema": tensors, "args": NAMESPACE}
            torch.save(content, whole, _use_new_zipfile_serialization=name == "new.pt")
        data = whole.read_bytes()
        part = whole.with_stem("part")
        for size in sorted({*range(0, len(data), max(1, len(data) // 60)), *range(1, 12), len(data) - 1}):
            part.write_bytes(data[:size])
            self.refused(part)

    @pytest.mark.parametrize("name", ["new.pt", "old.pt", "a.safetensors"])
    @pytest.mark.filterwarnings("ignore")
    def test_bytes_changed_anywhere_never_escape_as_another_error(
        self, tmp_path: Path, tensors: dict[str, Tensor], name: str
    ) -> None:
        """Changed weights may pass, as nothing but their values tells; whatever else happens is explained."""
        whole = tmp_path / name
        if name == "a.safetensors":
            save_file(tensors, whole)
        else:
            torch.save(
                {"ema": tensors, "args": NAMESPACE}, whole, _use_new_zipfile_serialization=name == "new.pt"
            )
        data, refused = whole.read_bytes(), 0
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            changed = bytearray(data)
            for position in torch.randint(len(data), (3,), generator=generator).tolist():
                changed[position] = int(torch.randint(256, (), generator=generator))
            whole.write_bytes(changed)
            try:
                read_checkpoint(whole)
            except DyditError:
                refused += 1
        assert refused > 20

    def test_nothing_is_written_beside_the_file(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        torch.save(tensors, tmp_path / "a.pt")
        before = (tmp_path / "a.pt").read_bytes()
        read_checkpoint(tmp_path / "a.pt")
        assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
        assert (tmp_path / "a.pt").read_bytes() == before
        shutil.rmtree(tmp_path)
