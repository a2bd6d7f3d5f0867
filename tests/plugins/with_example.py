"""A plug-in of pytest: the contract tests on models whose width routers are the example's.

python -m pytest -p tests.plugins.with_example tests/contract -k 'dit or sit'
"""

from __future__ import annotations

from pathlib import Path

import tests.tiny
from dydit_cli.plugins import load_plugin

load_plugin(Path(__file__).resolve().parent.parent.parent / "examples" / "my_router.py")
for name in ("dit", "sit"):
    tests.tiny.CONFIGS[name]["width"] = "unit"
