"""Reading text-to-video Lattes: diffusers' folders and the original's flat names; what cannot be read; what commands refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dydit_cli
from dydit_cli.artifacts import load_for_training
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Hints
from dydit_cli.families.latte_t2v_files import read, recognises
from dydit_cli.families.registry import FAMILIES
from dydit_cli.sampling.run import sample
from tests.families.latte_t2v import CONFIG, FIXED, arguments, stock_model
from tests.tiny import bits, relative_difference, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The transformer's folder of a pipeline."""
    stock_model().save_pretrained(tmp_path / "pipeline" / "transformer")
    return tmp_path / "pipeline" / "transformer"


def changed(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("which", ["transformer", "pipeline", "sharded"])
@torch.no_grad()
def test_a_folder_converts(folder: Path, which: str) -> None:
    """Everything that its config.json says arrives; weights and unit order are untouched."""
    stock = stock_model()
    if which == "sharded":
        folder = folder.with_name("sharded")
        stock.save_pretrained(folder, max_shard_size="100KB")
    report = dydit_cli.convert(folder.parent if which == "pipeline" else folder, out="c")
    assert report.family == "latte-t2v"
    assert report.verification.weights == 0
    assert report.verification.switched_on == 1
    model = dydit_cli.load_model("c", execution="static")
    assert {name: model.config[name] for name in CONFIG} == CONFIG
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in stock.state_dict().items())
    given = arguments()
    expected = stock(*given).sample
    assert torch.equal(bits(model(*given).sample), bits(expected))
    assert relative_difference(model.set_execution("compact")(*given).sample, expected) < 1e-5


@torch.no_grad()
def test_the_original_file_converts() -> None:
    """Wrapped by the training script, with the buffers of older classes; sizes come from the position tables then."""
    stock = stock_model()
    extra = {
        "caption_projection.y_embedding": torch.zeros(120, 32),
        "pos_embed.pos_embed": stock.pos_embed.pos_embed,
        "temp_pos_embed": stock.temp_pos_embed,
    }
    torch.save({"ema": stock.state_dict() | extra, "model": {}}, "t2v.pt")
    with pytest.raises(DyditError, match="number of attention heads"):
        dydit_cli.convert("t2v.pt", out="c")
    dydit_cli.convert("t2v.pt", out="c", num_heads=3, num_groups=6)
    model = dydit_cli.load_model("c", execution="static")
    assert (model.geometry.num_heads, model.geometry.num_groups) == (3, 6)
    assert (model.config["sample_size"], model.config["video_length"]) == (8, 3)
    given = arguments()
    assert torch.equal(bits(model(*given).sample), bits(stock(*given).sample))


def test_tensors_alone_are_taken_for_the_published_model() -> None:
    source = read(stock_model().state_dict(), Hints(num_heads=3))
    assert (source.config["sample_size"], source.config["video_length"]) == (64, 16)
    assert not source.dynamic


def test_no_other_family_takes_its_files_for_theirs() -> None:
    tensors = stock_model().state_dict()
    assert [family.name for family in FAMILIES if family.recognises(tensors)] == ["latte-t2v"]
    assert not recognises(tiny_model("dit").state_dict())


@pytest.mark.parametrize("name", list(FIXED)[:1] + list(FIXED)[2:])
def test_blocks_of_another_kind_are_refused(folder: Path, name: str) -> None:
    other = {"activation_fn": "geglu", "norm_type": "layer_norm", "norm_elementwise_affine": True}[name]
    with pytest.raises(DyditError, match=f"sets {name} to {other!r}"):
        dydit_cli.convert(changed(folder, **{name: other}), out="c")


def test_contradictions_and_gaps_are_refused(folder: Path) -> None:
    with pytest.raises(DyditError, match="5 attention heads do not divide the 48 channels"):
        dydit_cli.convert(changed(folder, num_attention_heads=5), out="c")
    tensors = dict(stock_model().state_dict())
    for key in [key for key in tensors if key.startswith("temporal_transformer_blocks.1.")]:
        del tensors[key]
    with pytest.raises(DyditError, match="2 spatial and 1 temporal blocks"):
        read(tensors, Hints(num_heads=3))
    tensors = dict(stock_model().state_dict())
    del tensors["transformer_blocks.1.attn2.to_v.weight"]
    torch.save(tensors, "cut.pt")
    with pytest.raises(DyditError, match="does not fit a text-to-video Latte of 48 channels and 4 blocks"):
        dydit_cli.convert("cut.pt", out="c", num_heads=3)


def test_what_is_not_done_for_it_is_refused(folder: Path) -> None:
    from dydit_cli.export.export import export
    from dydit_cli.recipe.schema import ExportSection

    dydit_cli.convert(folder, out="c")
    refused: dict[str, Callable[[], object]] = {
        "dydit finetune": lambda: load_for_training("c"),
        "dydit sample": lambda: sample("c", out="s"),
        "--importance taylor": lambda: dydit_cli.convert(folder, out="t", importance="taylor", data="d"),
    }
    for name, call in refused.items():
        with pytest.raises(DyditError, match=f"`{name}` does not take a text-to-video Latte") as error:
            call()
        assert error.value.fix
    with pytest.raises(DyditError, match="diffusers format does not take a text-to-video Latte") as error:
        export(ExportSection(model="c", out="e"))
    assert "torch-export" in error.value.fix
    assert not any(Path(name).exists() for name in ("s", "e", "t"))


def test_profile_works_on_a_converted_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by formula and counters, timed; the note says that it saw noise, and where to go on."""
    from dydit_cli.cli.app import main

    dydit_cli.convert(folder, out="c")
    words = ["profile", "--model", "c", "--timesteps", "3", "--repetitions", "2", "--latency-batch", "1"]
    assert main([*words, "--json", "--out", "p"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["ratio"] == 1
    assert all(counted["agrees"] for counted in report["counted"].values())
    assert report["latency"]["compact_ms"] > 0
    assert report["trajectory_ratio"] is None
    assert "LattePipeline" in captured.err
    assert "Noise and an embedding of noise" in captured.err
    assert Path("p/heads.png").exists()
