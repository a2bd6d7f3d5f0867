"""dydit makes trained diffusion transformers dynamic, and so cheaper to run.

The public surface, loaded at first use so that `import dydit_cli` stays instant:

* `load_model(path, execution="compact", ...)`: a dynamic model for inference.
* `convert(checkpoint, out=..., ...)`: make a static checkpoint dynamic.
* `count_macs(model, routing=None)`: multiply-accumulates by formula.
* `load_plugin(file)`: rankings, routers and baselines of your own.
* `DyditError`: the one exception that a user's mistake raises.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dydit_cli.errors import DyditError
from dydit_cli.export.registration import register

if TYPE_CHECKING:
    from dydit_cli.artifacts.loading import load_model
    from dydit_cli.conversion.convert import convert
    from dydit_cli.flops import count_macs
    from dydit_cli.plugins import load_plugin

__all__ = ["DyditError", "__version__", "convert", "count_macs", "load_model", "load_plugin"]

__version__ = "0.1.0"

# Exported pipelines load after `import dydit_cli` without flags; imports neither torch nor diffusers.
register()

_HOMES = {
    "convert": "dydit_cli.conversion.convert",
    "count_macs": "dydit_cli.flops",
    "load_model": "dydit_cli.artifacts.loading",
    "load_plugin": "dydit_cli.plugins",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dydit_cli' has no attribute '{name}'")
