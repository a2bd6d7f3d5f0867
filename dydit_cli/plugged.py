"""Which plug-ins are in use: the record that manifests keep and loading compares with. `plugins.py` writes it, nobody else does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PluginFile:
    """A user's file that added something.

    Attributes:
        name: Of the file.
        sha256: Of its content.
        provides: What it added, as ``width unit`` or ``ranking l1``.
    """

    name: str
    sha256: str
    provides: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {**asdict(self), "provides": list(self.provides)}


IN_USE: dict[str, PluginFile] = {}
"""By name. Loading a plug-in changes what names mean for the whole process, which is why this is the process's."""


def provider_of(kind: str, name: str) -> PluginFile | None:
    """The plug-in in use that added ``name``; None for what the package has itself."""
    return next((file for file in IN_USE.values() if f"{kind} {name}" in file.provides), None)
