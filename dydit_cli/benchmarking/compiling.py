"""The compiled sides of a benchmark: copies of a model that run static and compact through torch.compile."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from dydit_cli.families.dynamic_model import DynamicModel


@dataclass(frozen=True)
class Compilation:
    """Makes compiled twins of a model that share its weights, so that the other sides stay as they are."""

    def models(self, model: DynamicModel) -> dict[str, DynamicModel]:
        """The twins by side; they compile when they first run."""
        return {
            "compiled_static": copy.copy(model).set_execution("static", compile=True),
            "compiled": copy.copy(model).set_execution("compact", compile=True),
        }
