"""Where a user stands: warnings of models that are hardly cheaper, and commands that can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dydit_cli.cli.app import main
from dydit_cli.cli.standing import next_stage, warn_if_hardly_cheaper
from dydit_cli.recipe.loading import load_recipe
from scripts.surface import commands
from tests.export.artifacts import trained


def warned(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("ratio", [None, 0.3, 0.97])
def test_a_cheaper_model_is_no_reason_to_warn(
    ratio: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_if_hardly_cheaper(ratio, "runs/t")
    warn_if_hardly_cheaper(1.0, "runs/t", "static")
    assert warned(capsys) == ""


def test_hardly_cheaper(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_hardly_cheaper(0.98, "runs/t")
    assert "still does 98.0% of the static model's" in warned(capsys)
    warn_if_hardly_cheaper(1.0, "my runs/t")
    said = warned(capsys)
    assert "its routers were not trained" in said
    assert "dydit finetune --model 'my runs/t'" in said


def proposed(err: str) -> list[str]:
    """The words of the command behind "next: "."""
    line = next(line for line in reversed(err.splitlines()) if line.startswith("next: "))
    return shlex.split(line.removeprefix("next: ").split("   ")[0])


def check(words: list[str]) -> None:
    """Every option of a proposed command exists."""
    import typer

    from dydit_cli.cli.app import app

    assert words[0] == "dydit"
    known = dict(commands(typer.main.get_command(app)))
    options = {option for parameter in known[words[1]].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_the_chain_is_pasted_from_command_to_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's "next" is run as it stands, with less work."""
    assert main(["inspect", "builtin:dit_fmnist"]) == 0
    words = proposed(warned(capsys))
    check(words)
    words[words.index("--out") + 1] = "my runs/c"
    assert main(words[1:]) == 0
    words = proposed(warned(capsys))
    assert words[:5] == ["dydit", "finetune", "demo/fashion-mnist-dit", "--model", "my runs/c"]
    check(words)
    assert main([*words[1:], "--dry-run"]) == 0
    assert "takes the whole run" not in warned(capsys), "a proposed schedule reaches its target"
    assert (
        main(["sample", "--model", "my runs/c", "--num-images", "1", "--steps", "1", "--out", "my runs/s"])
        == 0
    )
    err = warned(capsys)
    assert "its routers were not trained" in err
    words = proposed(err)
    check(words)
    assert main(words[1:]) == 0
    assert Path("my runs/export/model_index.json").is_file()


def test_warnings_are_told_with_json_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(trained(tmp_path / "t", in_channels=1))
    words = [
        "sample",
        "--model",
        model,
        "--num-images",
        "1",
        "--steps",
        "1",
        "--keep-bias",
        "inf",
        "--out",
        "s",
        "--json",
    ]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("{")
    assert "warning: the model keeps everything" in err


def test_inspect_warns_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    assert main(["inspect", str(model)]) == 0
    assert "warning" not in capsys.readouterr().err
    manifest = model / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.512", "0.985"))
    assert main(["inspect", str(model)]) == 0
    assert "still does 98.5%" in capsys.readouterr().err


def test_a_recipe_goes_on_with_its_own_next_stage(tmp_path: Path) -> None:
    recipe = load_recipe("demo/fashion-mnist-dit")
    out = tmp_path / "c c"
    assert next_stage(recipe, out, ("finetune",)) is None, "its copy is not there"
    out.mkdir()
    (out / "recipe.yaml").write_text(recipe.to_yaml())
    assert next_stage(recipe, out, ("prepare", "finetune")) == f"dydit finetune '{out / 'recipe.yaml'}'"
    assert next_stage(load_recipe(None, ["model=a", "out=b"], "export"), out, ("finetune",)) is None
    assert next_stage(None, out, ("finetune",)) is None
