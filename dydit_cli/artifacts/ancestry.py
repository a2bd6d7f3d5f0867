"""The past of an artifact: its manifests, one after the other, as far as they are still there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.artifacts.manifest import read_manifest
from dydit_cli.errors import DyditError

LONGEST = 32
"""Stages; manifests that name each other in a circle end here."""


@dataclass(frozen=True)
class Ancestor:
    """A stage in a model's past.

    Attributes:
        stage: Its name, ``checkpoint`` for what all began with.
        path: As its manifest, or that of its child, says.
        words: What it did, in a few words.
        sha256: Of its weights, where it is recorded.
        state: ``present``, ``changed`` (its weights are no longer those that its child was made of) or ``gone``.
    """

    stage: str
    path: str
    words: str
    sha256: str | None
    state: str


def ancestors(manifest: Mapping[str, Any]) -> Iterator[Ancestor]:
    """The stages before the one of ``manifest``, the nearest first."""
    for _ in range(LONGEST):
        parent = manifest.get("parent") or {}
        if parent.get("path") is None:
            return
        path = Path(str(parent["path"]))
        before = manifest_of(path)
        if before is None:
            yield _end(parent, path)
            return
        recorded, present = parent.get("weights_sha256"), before.get("weights_sha256")
        yield Ancestor(
            stage=str(before.get("stage")),
            path=str(path),
            words=words_of(before),
            sha256=recorded or present,
            state="changed" if recorded and present and recorded != present else "present",
        )
        manifest = before


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """An artifact's manifest; None where there is none that can be read."""
    try:
        return read_manifest(folder)
    except DyditError:
        return None


def words_of(manifest: Mapping[str, Any]) -> str:
    """What a stage did, in a few words."""
    settings, results = manifest.get("settings") or {}, manifest.get("results") or {}
    stage = manifest.get("stage")
    if stage == "convert":
        return f"{settings.get('family', '')} by {results.get('importance', settings.get('importance', ''))}".strip()
    if stage == "finetune":
        ratio = results.get("ratio")
        made = f", ratio {ratio:.3f}" if isinstance(ratio, float) else ""
        return f"{results.get('steps', settings.get('steps'))} steps on {settings.get('data')}{made}"
    if stage == "export":
        return f"as {settings.get('format')}"
    return ""


def _end(parent: Mapping[str, Any], path: Path) -> Ancestor:
    """Where the manifests end: a checkpoint of others, or an artifact that is gone."""
    stage = str(parent.get("stage") or "checkpoint")
    return Ancestor(
        stage=stage,
        path=str(path),
        words="",
        sha256=parent.get("sha256") or parent.get("weights_sha256"),
        state="present" if path.exists() else "gone",
    )
