"""The names of all commands, arguments and options, one a line: what users and their scripts rely on.

    python scripts/surface.py            # print it
    python scripts/surface.py --write    # write it down after a change that is meant: tests/cli/surface.txt

A test compares the two, so that a name that changes or goes is seen in review.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = "tests/cli/surface.txt"


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below a group by its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def surface() -> str:
    """The whole surface, sorted inside each command so that moving an option is no change."""
    import typer

    from dydit_cli.cli.app import app

    root = typer.main.get_command(app)
    lines = ["dydit", *(f"  {line}" for line in sorted(_parameters(root)))]
    for name, command in sorted(commands(root)):
        lines += ["", f"dydit {name}", *(f"  {line}" for line in sorted(_parameters(command)))]
    return "\n".join(lines) + "\n"


def _parameters(command: Any) -> Iterator[str]:
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            yield f"<{parameter.name}>"
        elif "--install-completion" not in names and "--show-completion" not in names:
            yield " ".join(names)


def main() -> None:
    """Print the surface, or write it down."""
    sys.path.insert(0, str(ROOT))
    text = surface()
    if "--write" in sys.argv[1:]:
        (ROOT / FILE).write_text(text, encoding="utf-8")
        return
    print(text, end="")


if __name__ == "__main__":
    main()
