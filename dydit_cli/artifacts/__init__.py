"""Folders that stages write and read: atomic, explained by a manifest, loadable by diffusers. The only writer of files."""

from __future__ import annotations

from dydit_cli.artifacts.loading import load_for_training, load_model, model_config
from dydit_cli.artifacts.manifest import read_manifest, write_manifest
from dydit_cli.artifacts.saving import save_model
from dydit_cli.artifacts.writing import artifact_folder, atomic_write, write_json, writing

__all__ = [
    "artifact_folder",
    "atomic_write",
    "load_for_training",
    "load_model",
    "model_config",
    "read_manifest",
    "save_model",
    "write_json",
    "write_manifest",
    "writing",
]
