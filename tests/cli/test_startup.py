"""`dydit --help` answers at once, because parsing imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "fvcore",
    "matplotlib",
    "safetensors",
    "numpy",
)

PROBE = """
import json, sys
from dydit_cli.cli.app import main
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.write("\\n" + json.dumps({"code": code, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def imported(*arguments: str) -> set[str]:
    """The top-level modules in a process that ran `dydit` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True, cwd=_checkout()
    )
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["code"] == 0, done.stderr
    return set(report["modules"])


def _checkout() -> str:
    import dydit_cli

    return str(next(iter(dydit_cli.__path__)) + "/..")


def test_help_imports_no_library_but_typer_and_rich() -> None:
    modules = imported("--help")
    assert "typer" in modules  # the probe sees what is imported
    assert not modules & {*HEAVY, "pydantic", "yaml"}


@pytest.mark.parametrize(
    "command",
    [
        "convert",
        "finetune",
        "profile",
        "sample",
        "evaluate",
        "export",
        "compare",
        "bench",
        "demo",
        "inspect",
        "doctor",
    ],
)
def test_the_help_of_a_command_is_light_too(command: str) -> None:
    assert not imported(command, "--help") & set(HEAVY)


@pytest.mark.parametrize(
    "arguments", [("--version",), ("recipes", "list"), ("recipes", "validate", "demo/fashion-mnist-dit")]
)
def test_recipes_need_no_torch(arguments: tuple[str, ...]) -> None:
    assert not imported(*arguments) & set(HEAVY)


def test_help_takes_less_than_half_a_second() -> None:
    """Processor time, best of three, so that a busy machine fails nothing."""
    resource = pytest.importorskip("resource")
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "dydit_cli", "--help"], capture_output=True, check=True, cwd=_checkout()
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
