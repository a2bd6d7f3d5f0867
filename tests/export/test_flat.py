"""The way back: static bit for bit, and the original layout with routers, read again by conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dydit_cli
from dydit_cli.artifacts import load_model, save_model
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError
from dydit_cli.export.lineage import Lineage
from tests.export.artifacts import converted, exported, static_checkpoint, trained
from tests.tiny import bits, tiny_inputs, tiny_model

FAMILIES = pytest.mark.parametrize("family", ["dit", "sit"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@FAMILIES
def test_static_is_the_source_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = converted(tmp_path / "c", family, dtype)
    report = exported(tmp_path / "c", tmp_path / "e", "static")
    assert report.dtype == str(dtype).removeprefix("torch.")
    found = torch.load(tmp_path / "e" / "model.pt", weights_only=True)
    assert found.keys() == source.keys()
    for key, tensor in source.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(bits(found[key]), bits(tensor)), key


def test_static_restores_mixed_types_and_the_container(tmp_path: Path) -> None:
    source = static_checkpoint(tmp_path / "mixed.pt", dtype=torch.float16)
    source["pos_embed"] = source["pos_embed"].float()
    save_file(source, tmp_path / "mixed.safetensors")
    dydit_cli.convert(tmp_path / "mixed.safetensors", out=tmp_path / "c", family="dit", num_heads=6)
    exported(tmp_path / "c", tmp_path / "e", "static")
    found = read_checkpoint(tmp_path / "e" / "model.safetensors").tensors
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        key: tensor.dtype for key, tensor in source.items()
    }
    assert all(torch.equal(bits(found[key]), bits(source[key])) for key in source)


def test_static_in_another_type(tmp_path: Path) -> None:
    source = converted(tmp_path / "c")
    report = exported(tmp_path / "c", tmp_path / "e", "static", dtype="bfloat16")
    found = torch.load(tmp_path / "e" / "model.pt", weights_only=True)
    assert all(torch.equal(found[key], source[key].bfloat16()) for key in source)
    assert "bit for bit" not in (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    assert report.dtype == "bfloat16"


def test_a_base_that_an_export_rounded_is_not_said_to_be_the_base(tmp_path: Path) -> None:
    converted(tmp_path / "c")
    claim = "those of the base model, bit for bit"
    for dtype, kept in (("float32", True), ("bfloat16", False)):
        exported(tmp_path / "c", tmp_path / f"{dtype}-1", dtype=dtype)
        exported(tmp_path / f"{dtype}-1", tmp_path / f"{dtype}-2", "static")
        assert (claim in (tmp_path / f"{dtype}-2" / "README.md").read_text(encoding="utf-8")) is kept


@pytest.mark.parametrize(
    ("stored", "given", "kept"),
    [
        ("bfloat16", ("bfloat16", "float32"), True),
        ("float16", ("bfloat16", "float32"), False),
        ("bfloat16", ("float16",), False),
        (None, ("float32",), False),
    ],
)
def test_a_type_holds_another(stored: str | None, given: tuple[str, ...], kept: bool) -> None:
    dtypes = {"*": stored, "y": "int64"} if stored else {}
    assert Lineage(base="b", dtypes=dtypes, cast_to=given).untouched is kept
    assert not Lineage(base="b", dtypes=dtypes, cast_to=given, loras=("l",)).untouched


def test_static_of_a_trained_model_is_its_complete_model(tmp_path: Path) -> None:
    model = load_model(trained(tmp_path / "t"), execution="static")
    exported(tmp_path / "t", tmp_path / "e", "static")
    dydit_cli.convert(tmp_path / "e" / "model.pt", out=tmp_path / "c", family="dit", num_heads=6)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(*inputs).sample
        found = load_model(tmp_path / "c", execution="static")(*inputs).sample
    assert torch.equal(bits(found), bits(expected))
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned" in card
    assert "| ratio |" not in card


@FAMILIES
def test_the_original_layout_is_read_back(family: str, tmp_path: Path) -> None:
    before = load_model(trained(tmp_path / "t", family))
    report = exported(tmp_path / "t", tmp_path / "e", "original")
    assert any("order" in note for note in report.notes)
    dydit_cli.convert(tmp_path / "e", out=tmp_path / "c", family=family, num_heads=6)
    after = load_model(tmp_path / "c")
    state = after.state_dict()
    assert state.keys() == before.state_dict().keys()
    assert all(torch.equal(bits(state[key]), bits(tensor)) for key, tensor in before.state_dict().items())
    inputs = tiny_inputs(before)
    with torch.no_grad():
        assert torch.equal(after(*inputs).sample, before(*inputs).sample)


def test_the_original_layout_has_the_authors_names_and_orders_only_where_they_say_something(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    model = tiny_model("dit", shuffled=False)
    model.blocks[1].attn.head_order.copy_(torch.arange(6).flip(0))
    save_model(model, folder)
    exported(folder, tmp_path / "e", "original")
    found = torch.load(tmp_path / "e" / "model.pt", weights_only=True)
    assert [key for key in found if "order" in key] == ["blocks.1.attn.head_order"]
    ours = {key for key in found if ".0." in key and ("rate" in key or "token_selection" in key)}
    expected = {
        "attn_rate.router",
        "mlp_rate.router",
        "token_selection.mlp_head.0",
        "token_selection.mlp_head.2",
    }
    assert {
        key.removeprefix("blocks.0.").rpartition(".")[0] for key in ours if key.startswith("blocks.0.")
    } == expected
    assert found["blocks.0.attn_rate.router.weight"].shape == (5, 48)
    assert not any("_router." in key for key in found)


def test_the_authors_own_file_comes_back_as_it_was(tmp_path: Path) -> None:
    """Identity order: what their code reads is what their code wrote."""
    folder = tmp_path / "t"
    folder.mkdir()
    save_model(tiny_model("dit", shuffled=False), folder)
    report = exported(folder, tmp_path / "theirs", "original")
    assert report.notes == ()
    theirs = torch.load(tmp_path / "theirs" / "model.pt", weights_only=True)
    dydit_cli.convert(tmp_path / "theirs" / "model.pt", out=tmp_path / "c", family="dit", num_heads=6)
    exported(tmp_path / "c", tmp_path / "e", "original")
    again = torch.load(tmp_path / "e" / "model.pt", weights_only=True)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(bits(again[key]), bits(theirs[key])) for key in theirs)


@pytest.mark.parametrize("kind", ["original", "static"])
def test_the_code_of_the_card_runs(kind: str, tmp_path: Path) -> None:
    converted(tmp_path / "c")
    exported(tmp_path / "c", tmp_path / "e", kind)
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "x_embedder.proj.weight" in names["weights"]


def test_an_autoencoder_has_no_place_in_a_flat_file(tmp_path: Path) -> None:
    converted(tmp_path / "c")
    with pytest.raises(DyditError, match="takes no autoencoder"):
        exported(tmp_path / "c", tmp_path / "e", "static", vae=str(tmp_path))
    assert not (tmp_path / "e").exists()
