"""Run a saved program as its user does: in a process that has torch and nothing of ours. This file is a script of its own.

    python fresh.py PROGRAM CASES RESULT

CASES is a file of torch with a list of (inputs by name, expected output); RESULT becomes a JSON file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ABSENT = ("dydit_cli", "diffusers", "transformers", "peft")


class Absent(MetaPathFinder):
    """Makes packages look as if they were not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse what must not be needed."""
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{name} is not needed to run a program", name=name)
        return None


def main(program: str, cases: str, result: str) -> None:
    """Load the program, run all cases, write the largest difference and the largest expected value."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if place != here]
    sys.meta_path.insert(0, Absent())
    import torch

    module = torch.export.load(program).module()
    differences, scales = [], []
    with torch.no_grad():
        for inputs, expected in torch.load(cases, weights_only=True):
            found = module(**inputs)
            differences.append(float((found.float() - expected.float()).abs().max()))
            scales.append(float(expected.float().abs().max()))
    Path(result).write_text(json.dumps({"differences": differences, "scales": scales}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
