"""All checks, in the order in which they are shown."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

from dydit_cli.diagnosis.check import Check, Verdict
from dydit_cli.diagnosis.machine import check_machine
from dydit_cli.diagnosis.packages import check_dydit, check_needed, check_optional, check_python
from dydit_cli.diagnosis.places import check_places


def examine(version: str) -> Iterator[Check]:
    """Look at everything; imports torch and the libraries above it, which takes some seconds.

    Args:
        version: Of dydit.
    """
    yield check_python()
    yield check_dydit(version)
    needed = list(check_needed())
    yield from needed
    if any(check.name == "torch" and check.verdict is Verdict.BROKEN for check in needed):
        yield Check(
            "machine",
            "torch",
            Verdict.NOTE,
            "devices and threads were not looked at, because torch does not work",
        )
    else:
        yield from check_machine(importlib.import_module("torch"))
    yield from check_optional()
    yield from check_places(os.environ)
