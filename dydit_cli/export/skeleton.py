"""A model without its weights: what a configuration alone tells, before gigabytes are read."""

from __future__ import annotations

from typing import Any

import torch

from dydit_cli.errors import DyditError
from dydit_cli.export.report import Source
from dydit_cli.families.dynamic_model import DynamicModel


def arguments_of(source: Source) -> dict[str, Any]:
    """A configuration without what diffusers adds: what the model's class takes."""
    return {name: value for name, value in source.config.items() if not name.startswith("_")}


def skeleton(source: Source) -> DynamicModel:
    """The model in its family's own convention, on the device ``meta``.

    Raises:
        DyditError: If the configuration is damaged, or its routers are those of a plug-in that is not loaded.
    """
    try:
        with torch.device("meta"):
            return source.family.model_class(**arguments_of(source))
    except (KeyError, TypeError, ValueError) as error:
        raise DyditError(
            f"The configuration in {source.path} is none of a {source.family.title}.",
            why=f"No model can be made of it: {error}.",
            fix="Copy the folder again, or run the stage that wrote it again.",
        ) from error
