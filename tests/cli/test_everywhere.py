"""What holds for every command: its result as JSON alone on stdout, silence on request, examples, and a surface that is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from dydit_cli.cli import console
from dydit_cli.cli.app import app, main
from scripts.surface import FILE, commands, surface

COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_examples(name: str) -> None:
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert "--json" in options
    assert COMMANDS[name].epilog, f"dydit {name} shows no examples"
    assert f"dydit {name}" in COMMANDS[name].epilog


def test_the_surface_is_the_one_that_is_written_down(repository: Path) -> None:
    """Names of commands and options are promises; a change of them is one of this file, on purpose (`scripts/surface.py --write`)."""
    assert surface() == (repository / FILE).read_text(encoding="utf-8")


JSON_COMMANDS = [
    ("doctor",),
    ("inspect", "builtin:sit_fmnist"),
    ("recipes", "list"),
    ("recipes", "show", "demo/fashion-mnist-dit"),
    ("recipes", "show", "demo/fashion-mnist-dit", "--resolved"),
    ("recipes", "copy", "demo/fashion-mnist-dit", "a.yaml"),
    ("recipes", "validate", "demo/fashion-mnist-dit"),
]


@pytest.mark.parametrize("words", JSON_COMMANDS, ids=" ".join)
def test_stdout_is_json_alone(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_mistakes_as_json_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("schema: 1\nconvert:\n  chekpoint: a\n")
    assert main(["recipes", "validate", "bad.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    (entry,) = json.loads(out)
    assert not entry["ok"]
    assert "checkpoint" in " ".join(entry["mistakes"])
    assert "checkpoint" in err


@pytest.fixture
def profiles() -> Path:
    """A folder with a profile that `dydit compare` reads."""
    folder = Path("p")
    folder.mkdir()
    content = {
        "ratio": 0.5,
        "gmacs": 0.04,
        "static_gmacs": 0.08,
        "params": {"total": 10, "routers": 1, "static": 9},
        "latency": None,
        "model": {"execution": "compact"},
    }
    (folder / "profile.json").write_text(json.dumps(content))
    return folder


def test_a_comparison_as_json(profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(profiles), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["runs"][0]["values"]["ratio"]["value"] == 0.5


@pytest.mark.parametrize("words", [["--quiet", "inspect"], ["inspect", "--quiet"]])
def test_quiet_leaves_results(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "builtin:dit_fmnist"]) == 0
    out, err = capsys.readouterr()
    assert "6 blocks of 128 channels" in out
    assert err == ""
    # Asked for once, it does not stay.
    assert main(["inspect", "builtin:dit_fmnist"]) == 0
    assert "next: " in capsys.readouterr().err


def test_quiet_leaves_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with console.quieted(True):
        console.note("a note")
        console.warn("a warning")
        console.explain("what", "why", "fix")
    assert capsys.readouterr().err == "warning: a warning\nwhat\n  why: why\n  fix: fix\n"
    assert main(["--quiet", "inspect", "nowhere"]) == 2
    assert "There is nothing at nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["inspct"], "did you mean 'inspect'?"),
        (["doktor"], "did you mean 'doctor'?"),
        (["profile", "--reprot", "a"], "did you mean '--report'?"),
        (["inspect", "builtin:dit_fmist"], "did you mean 'dit_fmnist'?"),
        (["recipes", "show", "demo/fashion-mnist-dti"], "did you mean 'demo/fashion-mnist-dit'?"),
        (["profile", "--preset", "dit-xl2"], "did you mean 'dit-xl/2'?"),
        (
            ["convert", "--checkpoint", "builtin:dit_fmnist", "--out", "b", "--family", "dti"],
            "did you mean 'dit'?",
        ),
        (["profile", "--model", "a", "--dtype", "float3"], "did you mean 'float32'?"),
        (["export", "--model", "a", "--out", "b", "--format", "difusers"], "did you mean 'diffusers'?"),
        (["convert", "chekpoint=a", "out=b"], "did you mean 'checkpoint'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_near_misses(words: list[str], fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert fix in capsys.readouterr().err
