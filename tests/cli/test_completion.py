"""Completion by the shells' own protocol: environment variables in, candidates out, and no torch in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dydit_cli.checkpoints.builtin import builtin_models
from dydit_cli.cli import completing
from dydit_cli.cli.completing import joined, whole_words
from dydit_cli.families.registry import FAMILIES
from tests.cli.test_startup import HEAVY

SCRIPT = "import sys; from dydit_cli.cli.app import main; sys.exit(main())"

PROBE = """
import atexit, json, sys
atexit.register(lambda: sys.stderr.write(json.dumps(sorted({name.split(".")[0] for name in sys.modules}))))
from dydit_cli.cli.app import main
main([])
"""


def completed(repository: Path, words: list[str], shell: str = "bash") -> list[str]:
    """What a shell is offered for the last of the words."""
    protocol = {
        "bash": {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": " ".join(words)},
        "fish": {"_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        "powershell": {
            "_TYPER_COMPLETE_ARGS": " ".join(words),
            "_TYPER_COMPLETE_WORD_TO_COMPLETE": words[-1],
        },
    }[shell]
    environment = (
        os.environ | protocol | {"_DYDIT_COMPLETE": f"complete_{shell}", "PYTHONPATH": str(repository)}
    )
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stderr.splitlines()[-1])) & set(HEAVY)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dydit", "pre"], ["prepare"]),
        (["dydit", "convert", "--fam"], ["--family"]),
        (["dydit", "convert", "--family", ""], ["auto", *(family.name for family in FAMILIES)]),
        (["dydit", "convert", "dit-xl"], ["dit-xl-2-256/full", "dit-xl-2-256/lora", "dit-xl-2-256/td-lora"]),
        (["dydit", "bench", "--preset", "flux-s"], ["flux-schnell"]),
        (["dydit", "sample", "--sampler", "d"], ["ddpm", "ddim", "dpm++", "dopri5"]),
        (["dydit", "export", "--format", "or"], ["original"]),
        (["dydit", "finetune", "target_r"], ["target_ratio=", "target_ratio=0.5"]),
        # As bash breaks them: it replaces what stands behind the last sign.
        (["dydit", "sample", "sampler", "=", "dd"], ["ddpm", "ddim"]),
        (["dydit", "convert", "--checkpoint", "builtin", ":", "s"], ["sit_fmnist", "sit_fmnist_long"]),
        (["dydit", "recipes", "show", "demo/fashion-mnist-s"], ["demo/fashion-mnist-sit"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash(words: list[str], expected: list[str], repository: Path) -> None:
    assert completed(repository, words) == expected


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("zsh", ["_arguments '*: :((\"original\"))'"]),
        ("fish", ["original"]),
        ("powershell", ["original::: "]),
    ],
)
def test_other_shells(shell: str, expected: list[str], repository: Path) -> None:
    assert completed(repository, ["dydit", "export", "--format", "or"], shell) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_the_script_that_a_shell_reads(shell: str, repository: Path) -> None:
    environment = os.environ | {"_DYDIT_COMPLETE": f"source_{shell}", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "_DYDIT_COMPLETE" in done.stdout
    assert f"complete_{shell}" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_in_a_bash(repository: Path, tmp_path: Path) -> None:
    """The script that is installed, sourced by a real bash and called as bash calls it."""
    command = tmp_path / "bin" / "dydit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m dydit_cli "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(repository),
    }
    script = (
        'eval "$(_DYDIT_COMPLETE=source_bash dydit)"; COMP_WORDS=(dydit inspect builtin : l); COMP_CWORD=4; '
        '_dydit_completion dydit; echo "${COMPREPLY[@]}"; complete -p dydit'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.splitlines() == ["latte_fmnist", "complete -o default -F _dydit_completion dydit"]


def test_names_that_are_repeated_are_those_of_the_registry() -> None:
    assert tuple(family.name for family in FAMILIES) == completing.FAMILIES
    assert set(completing.presets()) == {
        f"{family.name}-{name}" for family in FAMILIES for name in family.presets
    }
    assert completing.shipped_models() == list(builtin_models())


def test_words_that_bash_broke_are_put_together() -> None:
    assert joined(["dydit", "inspect", "builtin", ":", "d"], 4) == (["dydit", "inspect", "builtin:d"], 2)
    assert joined(["dydit", "inspect", "builtin", ":"], 3) == (["dydit", "inspect", "builtin:"], 2)
    assert joined(["dydit", "sample", "a", "=", "b", "--out", ""], 6) == (
        ["dydit", "sample", "a=b", "--out", ""],
        4,
    )
    assert joined(["dydit", "sample", "a", "=", "b", "--out", "x"], 2) == (
        ["dydit", "sample", "a=b", "--out", "x"],
        2,
    )


def test_elsewhere_nothing_is_touched() -> None:
    environment = {"COMP_WORDS": "a\nb", "_DYDIT_COMPLETE": "complete_zsh"}
    with whole_words(environment):
        assert environment["COMP_WORDS"] == "a\nb"
