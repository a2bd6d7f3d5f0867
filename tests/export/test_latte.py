"""Exports of Latte: parts for diffusers with code that runs, the original's layout, the static model; and the way back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dydit_cli
from dydit_cli.artifacts import load_model
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.checkpoints import read_checkpoint
from tests.export.artifacts import converted, exported, trained
from tests.export.test_pipeline import run
from tests.tiny import tiny_inputs

each_form = pytest.mark.parametrize("changes", [{}, {"num_classes": 0}], ids=["classes", "unconditional"])


@each_form
def test_the_card_s_code_draws_videos(tmp_path: Path, changes: dict[str, int]) -> None:
    """With diffusers alone in a process without the package, and with dydit: the same videos."""
    report = exported(trained(tmp_path / "t", "latte", **changes), tmp_path / "e")
    assert report.max_difference < 1e-5
    assert any("no pipeline" in note for note in report.notes)
    assert not (tmp_path / "e" / "model_index.json").exists()
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    ours, alone = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "dydit_cli" not in alone
    save = "\nfrom safetensors.torch import save_file\nsave_file({'videos': videos}, 'alone.safetensors')\n"
    few = alone.replace("set_timesteps(50)", "set_timesteps(4)")
    run(few + save, tmp_path)
    from safetensors.torch import load_file

    videos = load_file(tmp_path / "alone.safetensors")["videos"]
    assert videos.shape == (2, 2, 4, 8, 8)
    names: dict[str, torch.Tensor] = {}
    here = ours.replace("set_timesteps(50)", "set_timesteps(4)").replace('"e"', repr(str(tmp_path / "e")))
    exec(compile(here, "card", "exec"), names)
    torch.testing.assert_close(names["videos"], videos, rtol=0, atol=1e-5)


def test_an_export_loads_without_remarks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = trained(tmp_path / "t", "latte")
    exported(source, tmp_path / "e")
    capfd.readouterr()
    model, again = load_model(source), load_model(tmp_path / "e")
    videos, times, labels = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(videos, times, labels).sample, again(videos, times, labels).sample)
    assert "auto_map" not in capfd.readouterr().err + caplog.text
    assert "auto_map" in (model_folder(tmp_path / "e") / "config.json").read_text()


@each_form
def test_static_is_the_file_that_was_converted(tmp_path: Path, changes: dict[str, int]) -> None:
    tensors = converted(tmp_path / "c", "latte", **changes)
    exported(tmp_path / "c", tmp_path / "e", "static")
    (file,) = (tmp_path / "e").glob("*.pt")
    back = read_checkpoint(file).tensors
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@each_form
def test_the_original_layout_comes_back(tmp_path: Path, changes: dict[str, int]) -> None:
    source = trained(tmp_path / "t", "latte", **changes)
    exported(source, tmp_path / "e", "original")
    (file,) = (tmp_path / "e").glob("*.pt")
    dydit_cli.convert(file, out=tmp_path / "back", family="auto", num_heads=6)
    model, again = load_model(source), load_model(tmp_path / "back")
    state, other = model.state_dict(), again.state_dict()
    assert set(state) == set(other)
    assert all(torch.equal(state[key], other[key]) for key in state)
