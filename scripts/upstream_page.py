"""Run the reproductions of defects in other libraries and write what they print: docs/upstream.md.

    python scripts/upstream_page.py            # run them and print the page
    python scripts/upstream_page.py --write    # and write it, for the versions that are installed

A reproduction is a file of `scripts/upstream/`: a docstring that says what is wrong and what dydit does about it, and a few lines that
show it. It goes once its output no longer shows anything.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "scripts" / "upstream"
PAGE = ROOT / "docs" / "upstream.md"

LIBRARIES = {
    "torch": "torch",
    "diffusers": "diffusers",
    "peft": "peft",
    "accelerate": "accelerate",
    "fvcore": "fvcore",
    "transformers": "transformers",
    "torchao": "torchao",
}
"""Whose versions are named: what the reproductions are about, and what they import besides."""

INTRODUCTION = """\
# Upstream

Defects and surprises of other libraries that dydit met and works around, each with the least code that shows it. Written by
`python scripts/upstream_page.py --write`, which runs the files of `scripts/upstream/` and quotes what they print; the page says nothing
of versions that were not run. When an upgrade changes an output, what dydit does about it can perhaps go.

Run with {versions}, on a CPU.
"""


@dataclass(frozen=True)
class Case:
    """A reproduction.

    Attributes:
        file: Its file.
        title: First line of the docstring.
        text: The rest of it.
        code: The file without the docstring.
    """

    file: Path
    title: str
    text: str
    code: str


def cases() -> list[Case]:
    """All of them, in the order of their names, which begin with the library's."""
    return [read_case(file) for file in sorted(FOLDER.glob("*.py"))]


def read_case(file: Path) -> Case:
    """Take a reproduction apart.

    Raises:
        ValueError: If it has no docstring of a title and a text.
    """
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    title, _, text = (ast.get_docstring(tree) or "").partition("\n\n")
    if not (title and text):
        raise ValueError(f"{file.name} needs a docstring: a title, an empty line, and what is wrong")
    lines = source.splitlines()[tree.body[0].end_lineno :]
    return Case(file, title, text, "\n".join(lines).strip())


def run_case(case: Case) -> str:
    """What it prints on stdout.

    Raises:
        SystemExit: If it fails, which no reproduction may: it catches what it shows.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(case.file)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"error: {case.file.name} fails\n{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def page(outputs: Mapping[str, str]) -> str:
    """The page, from what the cases print, by the names of their files."""
    versions = ", ".join(f"{name} {version(package)}" for name, package in LIBRARIES.items())
    parts = [INTRODUCTION.format(versions=versions)]
    for case in cases():
        parts.append(
            f"## {case.title}\n\n{case.text}\n\n```py\n# {case.file.relative_to(ROOT).as_posix()}\n{case.code}\n```\n\n"
            f"```text\n{outputs[case.file.name]}\n```\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Run all and print the page, or write it."""
    outputs = {}
    for case in cases():
        print(case.file.name, file=sys.stderr, flush=True)
        outputs[case.file.name] = run_case(case)
    text = page(outputs)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return
    print(text, end="")


if __name__ == "__main__":
    main()
