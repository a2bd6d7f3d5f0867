"""Where a model comes from, as the manifests of the artifacts before it tell: base checkpoint, training, cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from dydit_cli.artifacts import read_manifest
from dydit_cli.checkpoints.builtin import FOLDER, PREFIX
from dydit_cli.checkpoints.terms import terms_of
from dydit_cli.errors import DyditError

LONGEST = 32


@dataclass(frozen=True)
class Lineage:
    """What is known of a model's past; whatever is not known is None or empty.

    Attributes:
        base: Path of the checkpoint that was made dynamic, or ``builtin:NAME``.
        container: Its container, ``torch`` or ``safetensors``.
        dtypes: Type of its tensors by key; ``*`` is that of all others.
        layout: The layout of its keys, ``original`` or ``diffusers``.
        quantisation: Kind of the numbers that were made bf16 when it was read, such as ``fp8``.
        loras: Adapters that were merged into it.
        ratio: Measured share of the static model's attention and MLP MACs; None before any fine-tuning.
        target_ratio: What fine-tuning aimed at.
        steps: Optimiser steps of the last fine-tuning.
        data: What it was trained on, as given.
        classes: Names of the classes, where the data had them.
        cast_to: Types that exports on the way were told to give the weights.
        terms: Licence and repository of the base, as `checkpoints.terms.Terms` has them.
    """

    base: str | None = None
    container: str = "torch"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    layout: str | None = None
    quantisation: str = ""
    loras: tuple[str, ...] = ()
    ratio: float | None = None
    target_ratio: float | None = None
    steps: int | None = None
    data: str | None = None
    classes: tuple[str, ...] = ()
    cast_to: tuple[str, ...] = ()
    terms: Mapping[str, str] = field(default_factory=dict)

    @property
    def untouched(self) -> bool:
        """Whether the static part of the weights is the base's, bit for bit, once it has the base's types again."""
        changed = self.base is None or self.steps is not None or self.loras or self.quantisation
        stored = set(self.dtypes.values())
        return not changed and all(stored and _holds(wide, stored) for wide in self.cast_to)


def lineage_of(model: str | Path) -> Lineage:
    """Follow the manifests from an artifact to the checkpoint that it began with, as far as they are still there."""
    facts: dict[str, Any] = {}
    folder = Path(model)
    for _ in range(LONGEST):
        manifest = _manifest(folder)
        if manifest is None:
            break
        # What a later stage says of the model holds; earlier ones fill in the rest.
        facts = {**_facts(manifest), **facts}
        parent = (manifest.get("parent") or {}).get("path")
        if parent is None or manifest.get("stage") == "convert":
            break
        folder = Path(parent)
    return Lineage(**facts)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(folder)
    except DyditError:
        # A model without its history is a model all the same; the card then says that the base is not known.
        return None


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    stage, settings, results = (
        manifest.get("stage"),
        manifest.get("settings") or {},
        manifest.get("results") or {},
    )
    if stage == "convert":
        source = results.get("source") or {}
        found = {
            "base": _base(source.get("path")),
            "container": source.get("container"),
            "dtypes": source.get("dtypes"),
            "layout": source.get("layout"),
            "quantisation": source.get("quantisation"),
            "loras": tuple(PureWindowsPath(each["path"]).name for each in results.get("loras") or ()),
            "terms": _terms(source),
        }
    elif stage == "finetune":
        data = results.get("data") or {}
        found = {
            "ratio": results.get("ratio"),
            "target_ratio": settings.get("target_ratio"),
            "steps": results.get("steps"),
            "data": settings.get("data"),
            "classes": tuple(data.get("classes") or ()),
        }
    elif stage == "export":
        # An export carries the whole of it, because it travels without its parents.
        found = dict(results.get("lineage") or {})
        found |= {name: tuple(found.get(name) or ()) for name in ("cast_to", "classes", "loras")}
        if settings.get("dtype") is not None:
            found["cast_to"] = (*found["cast_to"], settings["dtype"])
    else:
        found = {}
    return {name: value for name, value in found.items() if value is not None and value != () and value != {}}


def _holds(name: str, others: Iterable[str]) -> bool:
    """Whether a type has every number of all the others."""
    wide = torch.finfo(getattr(torch, name))
    floats = [
        torch.finfo(dtype) for dtype in (getattr(torch, other) for other in others) if dtype.is_floating_point
    ]
    return all(wide.max >= each.max and wide.tiny <= each.tiny and wide.eps <= each.eps for each in floats)


def _terms(source: Mapping[str, Any]) -> Mapping[str, str]:
    """As the conversion recorded them; of an older one, as the checkpoint says them if it is still there."""
    if source.get("terms") is not None:
        return dict(source["terms"])
    path = source.get("path")
    return terms_of(Path(path)).as_json() if path and Path(path).exists() else {}


def _base(path: str | None) -> str | None:
    """A shipped model by its name: where the package is installed says nothing to whoever gets the export."""
    return f"{PREFIX}{Path(path).stem}" if path is not None and Path(path).parent == FOLDER else path
