"""The command line's surface, and what every kind of failure looks like: three parts, an exit code, no traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from dydit_cli.cli import app as application
from dydit_cli.cli.app import app, main
from dydit_cli.cli.help_text import examples, flowing
from dydit_cli.cli.stage import STAGES
from dydit_cli.errors import DyditError
from dydit_cli.recipe.schema import SECTIONS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

PROMISED = {
    "prepare": "data pipeline prompts count out resume",
    "convert": "checkpoint family num_heads importance out",
    "finetune": "model data target_ratio steps batch_size seed out resume",
    "profile": "model preset json",
    "sample": "model classes num_images steps guidance seed execution vae out device dtype",
    "evaluate": "model samples reference extractor against fail_if num_images steps guidance seed out json",
    "export": "model format out",
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the command line fail with a given exception."""

    def arrange(error: BaseException) -> None:
        def run(words: list[str], given: list[str]) -> int:
            raise error

        monkeypatch.setattr(application, "_run", run)

    return arrange


def parts(stderr: str) -> tuple[str, str, str]:
    """What, why and fix, each of which must be there."""
    what, _, rest = stderr.partition("\n  why: ")
    why, _, fix = rest.partition("\n  fix: ")
    assert what.strip()
    assert why.strip()
    assert fix.strip()
    assert "Traceback" not in stderr
    return what, why, fix.strip()


def test_the_commands() -> None:
    assert list(COMMANDS) == ["inspect", "plan", *STAGES, "compare", "bench", "demo", "doctor", "recipes"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_promised_options_exist(stage: str) -> None:
    assert set(PROMISED[stage].split()) <= {parameter.name for parameter in COMMANDS[stage].params}


@pytest.mark.parametrize("stage", STAGES)
def test_an_option_is_a_key_of_the_section_or_has_a_default_of_its_own(stage: str) -> None:
    fields = SECTIONS[stage].model_fields
    for parameter in COMMANDS[stage].params:
        if parameter.name in fields:
            assert parameter.default is None, f"--{parameter.name}: its default belongs into the schema"
        elif parameter.name != "arguments":
            assert parameter.default is not None, f"--{parameter.name} is no key of section {stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_that_help_shows_are_the_schemas(stage: str) -> None:
    fields = SECTIONS[stage].model_fields
    for parameter in COMMANDS[stage].params:
        shown = getattr(parameter, "show_default", None)
        field = fields.get(parameter.name)
        if not isinstance(shown, str) or field is None or field.default is None:
            continue
        if isinstance(field.default, bool):
            flag = parameter.name.replace("_", "-")
            assert shown == (flag if field.default else f"no-{flag}")
        elif isinstance(field.default, int | float):
            assert float(shown) == field.default, parameter.name
        elif isinstance(field.default, tuple):
            assert shown == ",".join(map(str, field.default)), parameter.name
        else:
            assert shown == str(field.default), parameter.name


HELPS = [
    *STAGES,
    "inspect",
    "compare",
    "bench",
    "demo",
    "doctor",
    "recipes",
    "recipes list",
    "recipes show",
    "recipes copy",
    "recipes validate",
]


@pytest.mark.parametrize("name", HELPS)
def test_help_says_what_for_and_gives_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: dydit" in text
    assert f"dydit {name}" in text.partition("Examples")[2]


def test_brackets_of_examples_survive_and_paragraphs_flow() -> None:
    assert examples(["dydit sample classes=[0,1]"]).endswith("classes=\\[0,1]")
    assert flowing("One line.\n\n    Two\n    lines.\n") == "One line.\n\nTwo lines."


def test_no_arguments_mean_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: dydit" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import dydit_cli

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dydit {dydit_cli.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["finetun"], "dydit has no command 'finetun'.", "did you mean 'finetune'?"),
        (["recipes", "lst"], "dydit recipes has no command 'lst'.", "did you mean 'list'?"),
        (["finetune", "--stpes", "3"], "dydit finetune has no option --stpes.", "did you mean '--steps'?"),
        (
            ["convert", "--max-shard-size", "x"],
            "dydit convert has no option --max-shard-size.",
            "Write max_shard_size=VALUE.",
        ),
        (["--xyzzy"], "dydit has no option --xyzzy.", "`dydit --help` lists them."),
        (["recipes", "show"], "Missing argument 'NAME'.", "`dydit recipes show --help` shows what it takes."),
        (
            ["finetune", "--steps"],
            "Option '--steps' requires an argument.",
            "`dydit --help` shows what it takes.",
        ),
    ],
)
def test_wrong_arguments(
    arguments: list[str], what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = parts(captured.err)
    assert (said[0], said[2]) == (what, fix)


def test_mistakes_of_recipe_overrides_and_options_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(
        "schema: 1\nfinetune:\n  data: d\n  model: m\n  out: t\n  steps: x\n  sede: 1\n"
    )
    assert main(["finetune", "r.yaml", "bacth_size=3", "--target-ratio", "7"]) == 2
    what, _, _ = parts(capsys.readouterr().err)
    assert what.splitlines() == [
        "4 mistakes in r.yaml and on the command line:",
        "  r.yaml:6: finetune.steps: must be a whole number, got 'x'",
        "  r.yaml:7: finetune.sede: unknown key, did you mean 'seed'?",
        "  command line: bacth_size=3: unknown key, did you mean 'batch_size'?",
        "  command line: finetune.target_ratio: must be at most 1, got 7.0",
    ]


def test_a_users_error_is_printed_as_it_is(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing(DyditError("no [red]such[/red] file: /a/[b]/:smile:.pt", why="w" * 300, fix="f"))
    assert main(["x"]) == 2
    expected = f"no [red]such[/red] file: /a/[b]/:smile:.pt\n  why: {'w' * 300}\n  fix: f\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("arguments", [["--debug", "x"], ["x", "--debug"], ["x", "--debug", "--", "y"]])
def test_debug_shows_the_traceback(
    failing: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    failing(DyditError("what", why="why", fix="fix"))
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("what\n  why: why\n  fix: fix\n")


def test_debug_after_two_dashes_is_an_argument(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing(DyditError("what", why="why", fix="fix"))
    main(["x", "--", "--debug"])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/a"), "The disk is full: /out/a"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "A file would grow beyond the allowed size"),
        (PermissionError(errno.EACCES, "no", "/out/[a]"), "Permission is denied: /out/[a]"),
        (OSError(errno.EROFS, "no", "/out"), "read-only"),
        (FileNotFoundError(errno.ENOENT, "no", "a"), "A file or folder is missing: a"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (MemoryError(), "Memory ran out"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "Memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "Memory ran out"),
        (
            ModuleNotFoundError("No module named 'fvcore'", name="fvcore"),
            "The package fvcore is not installed",
        ),
    ],
)
def test_what_the_machine_refuses(
    failing: Any, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    failing(error)
    assert main(["x"]) == 2
    assert said in parts(capsys.readouterr().err)[0]


def test_a_full_disk_is_found_below_another_error(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("writer failed")
    error.__context__ = OSError(errno.ENOSPC, "full")
    failing(error)
    assert main(["x"]) == 2
    assert "The disk is full" in parts(capsys.readouterr().err)[0]


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RuntimeError("a [b] c\nd"),
        ModuleNotFoundError("n", name="dydit_cli.nowhere"),
        ValueError(),
    ],
)
def test_anything_else_is_a_bug_of_ours(
    failing: Any, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    error.__context__ = FileNotFoundError(errno.ENOENT, "must not hide the bug", "a")
    failing(error)
    assert main(["x"]) == 1
    what, why, fix = parts(capsys.readouterr().err)
    assert type(error).__name__ in what
    assert "bug" in why
    assert "--debug" in fix


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interrupt_is_one_line(
    failing: Any, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    failing(error)
    assert main(["x"]) == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_an_interrupt_inside_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dydit_cli.recipe.builtin

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dydit_cli.recipe.builtin, "builtin_recipes", interrupted)
    assert main(["recipes", "list"]) == 130
    assert capsys.readouterr().err.endswith("interrupted.\n")


def test_signals_are_handed_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    main(["--version"])
    assert signal.getsignal(signal.SIGTERM) is before


def process(code: str, repository: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code that has `main` in a process of its own."""
    start = "import os, signal, sys\nfrom dydit_cli.cli import app as application\nmain = application.main\n"
    return subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=60,
        **options,
    )


def test_a_polite_stop_cleans_up(repository: Path) -> None:
    done = process(
        "def run(words, given):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        print('cleaned')\n"
        "application._run = run\n"
        "sys.exit(main(['x']))",
        repository,
    )
    assert (done.returncode, done.stdout) == (143, "cleaned\n")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the system has no file-size limit")
def test_a_file_size_limit_is_an_error_and_no_death(repository: Path, tmp_path: Path) -> None:
    done = process(
        "import resource\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "def run(words, given):\n"
        f"    open({str(tmp_path / 'a')!r}, 'wb').write(b'x' * 100_000)\n"
        "application._run = run\n"
        "sys.exit(main(['x']))",
        repository,
    )
    assert done.returncode == 2, done.stderr
    assert "A file would grow beyond the allowed size" in parts(done.stderr)[0]


def test_a_reader_that_leaves_is_no_error(repository: Path) -> None:
    command = [sys.executable, "-m", "dydit_cli", "recipes", "show", "dit-xl-2-256/full"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=repository, timeout=60
    )
    os.close(writing)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_written(repository: Path) -> None:
    command = [sys.executable, "-m", "dydit_cli", "recipes", "show", "dit-xl-2-256/full"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=repository, timeout=60
        )
    assert done.returncode == 2
    assert "The disk is full" in parts(done.stderr)[0]
