"""Run the tutorials: every command that a page shows with its output, in the order of the page.

    python scripts/tutorials.py                          # run all pages of docs/tutorials, each in a folder of its own
    python scripts/tutorials.py dit --out runs/tutorial  # one page, in a folder that stays
    python scripts/tutorials.py dit --write              # and put what the commands print into the page

In a page, a `console` block holds commands behind a `$` and what they printed; these run here, and their output is never typed by hand.
Blocks of Python run as well. Blocks called `sh` name files that only the reader has: tests see to it that their commands, options,
keys, recipes and presets exist, and nothing runs them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "docs" / "tutorials"
PROMPT = "$ "
WIDTH = 110

BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(block: str) -> list[str]:
    """The commands of a `console` block, each in one line."""
    joined = block.replace("\\\n", " ")
    return [line.removeprefix(PROMPT) for line in joined.splitlines() if line.startswith(PROMPT)]


def with_outputs(block: str, outputs: Sequence[str]) -> str:
    """A `console` block with the outputs of its commands in place of those that it has."""
    shown: list[list[str]] = []
    for line in block.splitlines():
        if line.startswith(PROMPT):
            shown.append([line])
        elif shown and shown[-1][-1].endswith("\\"):
            shown[-1].append(line)
    parts = ["\n".join([*command, *_lines(output)]) for command, output in zip(shown, outputs, strict=True)]
    return "\n\n".join(parts) + "\n"


def run_page(page: str, folder: Path, say: Callable[[str], None]) -> str:
    """Run what a page shows.

    Args:
        page: Its text.
        folder: Where the commands run.
        say: Told each command before it runs.

    Returns:
        The page with what the commands printed on stdout.

    Raises:
        SystemExit: If one fails, with what it wrote to stderr.
    """

    def run(found: re.Match[str]) -> str:
        language, block = found.groups()
        if language == "python":
            say("python")
            _run([sys.executable, "-c", block], folder)
            return found[0]
        outputs = []
        for command in commands_of(block):
            say(f"{PROMPT}{command}")
            outputs.append(_run(_words(command), folder))
        return f"```console\n{with_outputs(block, outputs)}```"

    return BLOCK.sub(run, page)


def _words(command: str) -> list[str]:
    program, *arguments = shlex.split(command)
    if program != "dydit":
        raise SystemExit(f"error: a console block runs dydit, not {program}")
    return [sys.executable, "-m", "dydit_cli", *arguments]


def _run(words: Sequence[str], folder: Path) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"error: exit code {done.returncode} of {shlex.join(words)}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def _lines(output: str) -> list[str]:
    """Without what a terminal's width adds to each line's end, and without empty lines at either end."""
    return [line.rstrip() for line in output.strip("\n").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pages that were named."""
    known = sorted(page.stem for page in FOLDER.glob("*.md"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(known)}; all if not given")
    parser.add_argument("--out", type=Path, help="folder to run in, which stays; of one page")
    parser.add_argument("--write", action="store_true", help="put the outputs into the pages")
    options = parser.parse_args(arguments)
    names = options.pages or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no such page: {', '.join(unknown)}; there are {', '.join(known)}")
    if options.out and len(names) > 1:
        parser.error("--out is for one page")
    for name in names:
        file = FOLDER / f"{name}.md"
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.out or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            text = run_page(
                file.read_text(encoding="utf-8"),
                folder,
                lambda line: print(line, file=sys.stderr, flush=True),
            )
        if options.write:
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
