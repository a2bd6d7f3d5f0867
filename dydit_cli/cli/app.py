"""The `dydit` command: its sub-commands, and the one place where a failure becomes a message and an exit code.

Importing this module imports typer and the commands' signatures, nothing else: each command imports its room when it runs.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from dydit_cli import __version__
from dydit_cli.cli import (
    bench,
    chatter,
    compare,
    completing,
    console,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    finetune,
    inspect,
    launched,
    plan,
    prepare,
    profile,
    recipes,
    sample,
)
from dydit_cli.cli.failures import failure_of
from dydit_cli.cli.help_text import examples, flowing
from dydit_cli.errors import DyditError

INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 1

EXAMPLES = (
    "dydit demo",
    "dydit convert --checkpoint builtin:dit_fmnist --out runs/c",
    "dydit recipes copy demo/fashion-mnist-dit my.yaml",
    "dydit finetune my.yaml target_ratio=0.4 --steps 800",
)

app = typer.Typer(
    name="dydit",
    help="Turn a trained static diffusion transformer into a dynamic one that does less work where less is needed.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        console.say(f"dydit {__version__}")
        raise typer.Exit


@app.callback(epilog=examples(EXAMPLES))
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, in any command.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print results, warnings and errors alone, in any command.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            help="Run a Python file of yours that adds rankings, routers or baselines, in any command.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Turn a trained static diffusion transformer into a dynamic one that does less work where less is needed."""


for _module, _command in (
    (inspect, inspect.inspect),
    (plan, plan.plan),
    (prepare, prepare.prepare),
    (convert, convert.convert),
    (finetune, finetune.finetune),
    (profile, profile.profile),
    (sample, sample.sample),
    (evaluate, evaluate.evaluate),
    (export, export.export),
    (compare, compare.compare),
    (bench, bench.bench),
    (demo, demo.demo),
    (doctor, doctor.doctor),
):
    app.command(help=flowing(_command.__doc__ or ""), epilog=examples(_module.EXAMPLES))(_command)
app.add_typer(recipes.app, name="recipes", epilog=examples(recipes.EXAMPLES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows `dydit`; the process's own arguments if not given.
    """
    # Read when torch loads its OpenMP: threads that spin long while they wait starve each other as soon as anything else runs on
    # the machine. Measured on two cores beside one busy process: 24 images/s of fine-tuning by default, 81 with this; alone, 211
    # and 216.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # What Apple's GPU cannot do yet is done by the CPU instead of ending the run; read when torch is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    console.settle_streams()
    chatter.hush()
    given = list(sys.argv[1:] if arguments is None else arguments)
    words, debug = _without_flag(given, "--debug")
    words, quiet = _without_flag(words, "--quiet")
    with _signals(), console.quieted(quiet), launched.worker(), completing.whole_words():
        try:
            code = _run(words or ["--help"], given)
            launched.part()
            sys.stdout.flush()
            return code
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted()
        except Exception as error:
            if _reader_left(error):
                _forget_stdout()
                return BROKEN_PIPE
            if debug:
                traceback.print_exc()
            failure = failure_of(error)
            if not launched.told(failure, error):
                console.explain(failure.what, failure.why, failure.fix)
            return failure.exit_code


def _run(words: list[str], given: list[str]) -> int:
    """Run typer without its own handling of errors; commands find what was ``given`` in their context."""
    words, plugins = _without_plugins(words)
    if plugins:
        from dydit_cli.plugins import load_plugin

        for plugin in plugins:
            load_plugin(plugin)
    code = typer.main.get_command(app).main(
        args=words or ["--help"], prog_name="dydit", standalone_mode=False, obj=given
    )
    # Typer turns Ctrl-C into this code and says nothing.
    if code == INTERRUPTED:
        return _interrupted()
    return code if isinstance(code, int) else 0


def _without_flag(words: list[str], flag: str) -> tuple[list[str], bool]:
    """Take a flag out of the arguments, wherever it stands before a `--`, and say whether it was there."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != flag]
    return kept + words[end:], len(kept) < end


def _without_plugins(words: list[str]) -> tuple[list[str], list[str]]:
    """Take `--plugin FILE` and `--plugin=FILE` out of the arguments, wherever they stand before a `--`.

    Raises:
        DyditError: If no file follows.
    """
    end = words.index("--") if "--" in words else len(words)
    kept: list[str] = []
    files: list[str] = []
    rest = iter(words[:end])
    for word in rest:
        name, sign, value = word.partition("=")
        if name != "--plugin":
            kept.append(word)
            continue
        file = value if sign else next(rest, "")
        if not file or file.startswith("-"):
            raise DyditError(
                "--plugin names no file.",
                why="A path is expected after it.",
                fix="Write --plugin my_router.py.",
            )
        files.append(file)
    return kept + words[end:], files


def _interrupted() -> int:
    if not launched.is_spoken_for():
        console.note("interrupted.")
    return INTERRUPTED


def _reader_left(error: Exception, system: str = os.name) -> bool:
    """Whether nobody reads what is printed any more; Windows calls that an invalid argument, of no file."""
    if isinstance(error, BrokenPipeError):
        return True
    return (
        system == "nt"
        and isinstance(error, OSError)
        and error.errno == errno.EINVAL
        and error.filename is None
    )


def _forget_stdout() -> None:
    """Drop what is still buffered for a reader that has gone (`dydit … | head`), or Python complains on leaving."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals() -> Iterator[None]:
    """Let a polite stop clean up, and let a file-size limit arrive as an error instead of killing the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    handlers: dict[str, Callable[[int, FrameType | None], None] | signal.Handlers] = {
        "SIGTERM": stop,
        "SIGXFSZ": signal.SIG_IGN,
    }
    before = {}
    try:
        for name, handler in handlers.items():
            if number := getattr(signal, name, None):  # Windows has no SIGXFSZ
                before[number] = signal.signal(number, handler)
    except ValueError:
        pass  # Handlers belong to the main thread; elsewhere whoever started the thread decides.
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
