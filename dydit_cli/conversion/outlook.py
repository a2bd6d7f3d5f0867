"""Which model a conversion will make, before it was made: from the checkpoint's header, or from the name of a published size."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.builtin import PREFIX, builtin_models
from dydit_cli.checkpoints.hub import is_repository
from dydit_cli.checkpoints.locating import glimpsed
from dydit_cli.conversion.convert import choose_family
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Family, Hints
from dydit_cli.families.registry import preset_named
from dydit_cli.recipe.schema import ConvertSection

PUBLISHED = re.compile(r"\b(dit|sit|latte)-(s|b|l|xl)-(\d)(?:-(256|512))?", re.IGNORECASE)
"""Names such as ``DiT-XL-2-256x256.pt`` and ``dit-xl-2-256/full``."""


@dataclass(frozen=True)
class Outlook:
    """A model that is known before it is there.

    Attributes:
        family: Its family.
        config: Of its class.
        source: Where that is known from, in words.
        assumed: Whether a name alone says so.
    """

    family: Family
    config: dict[str, Any]
    source: str
    assumed: bool = False


def outlook(section: ConvertSection | None, recipe_name: str, preset: str | None = None) -> Outlook:
    """Say which model a recipe's conversion will make.

    Args:
        section: The conversion; None where the recipe has none.
        recipe_name: Of the recipe.
        preset: A published size that the user names, such as ``dit-xl/2``.

    Raises:
        DyditError: If neither a checkpoint nor a name tells.
    """
    if preset is not None:
        family, config = preset_named(preset)
        return Outlook(family, _changed(config, section), f"the published size {preset}")
    if section is not None and _is_there(section.checkpoint):
        return _from_header(section)
    names = [Path(section.checkpoint).name] if section is not None else []
    for name in (*names, recipe_name):
        if match := PUBLISHED.search(name):
            kind, size, patch, side = match.groups()
            found = f"{kind}-{size}/{patch}{'-512' if side == '512' else ''}".lower()
            family, config = preset_named(found)
            return Outlook(
                family, _changed(config, section), f"the published size {found}, by the name {name}", True
            )
    wanted = section.checkpoint if section is not None else "of the recipe"
    raise DyditError(
        f"The model to be trained is not known: there is no checkpoint {wanted}.",
        why="Neither the converted model nor its checkpoint is there, and no published size is named like it.",
        fix="Pass --preset NAME (such as dit-xl/2), or bring the checkpoint.",
    )


def _is_there(checkpoint: str) -> bool:
    return (
        checkpoint.startswith(PREFIX) or Path(checkpoint).expanduser().exists() or is_repository(checkpoint)
    )


def _from_header(section: ConvertSection) -> Outlook:
    shipped = section.checkpoint.startswith(PREFIX)
    facts: dict[str, Any] = (
        dict(builtin_models().get(section.checkpoint.removeprefix(PREFIX), {})) if shipped else {}
    )
    known: dict[str, Any] = facts.get("config", {})
    axes = section.axes_dims_rope or known.get("axes_dims_rope")
    hints = Hints(
        section.num_heads or known.get("num_heads"), section.num_groups, tuple(axes) if axes else None
    )
    name = str(facts.get("family", "auto")) if section.family == "auto" else section.family
    with glimpsed(section.checkpoint) as path:
        checkpoint = open_checkpoint(path)
        family = choose_family(checkpoint, name)
        source = family.read(checkpoint.tensors, replace(hints, config={**checkpoint.config, **hints.config}))
    accepted = signature(family.model_class.__init__).parameters
    sizes: dict[str, Any] = {
        key: known[key] for key in ("sample_size", "text_tokens") if key in known and key in accepted
    }
    return Outlook(
        family, _changed({**source.config, **sizes}, section), f"the header of {section.checkpoint}"
    )


def _changed(config: dict[str, Any], section: ConvertSection | None) -> dict[str, Any]:
    """A configuration with what the recipe says of units."""
    if section is None:
        return dict(config)
    changes: dict[str, Any] = {}
    if section.num_groups is not None:
        changes["num_groups"] = section.num_groups
    if section.width != "free":
        changes["width"] = section.width
    return {**config, **changes}
