"""Write a profile: `profile.json`, the pictures, and a manifest that says how they came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import artifact_folder, write_json, write_manifest
from dydit_cli.profiling.plots import write_plots
from dydit_cli.profiling.profile import ProfileReport
from dydit_cli.profiling.token_maps import TokenMaps

SUMMARY = ("gmacs", "static_gmacs", "ratio", "total_ratio", "trajectory_ratio")


def write_profile(
    out: str | Path,
    report: ProfileReport,
    *,
    maps: TokenMaps | None = None,
    settings: dict[str, Any] | None = None,
    parent: str | Path | None = None,
    recipe_yaml: str | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
) -> list[str]:
    """Write a profile into a folder.

    Args:
        out: The folder; nothing is left of it if something fails.
        report: Of `profile`.
        maps: Of `token_maps`, where there are images.
        settings: The resolved settings of the stage; those of the report by default.
        parent: The model's folder.
        recipe_yaml: The resolved recipe, kept beside the results.
        device: Where the model ran.
        overwrite: Replace ``out``.

    Returns:
        Names of the files, the manifest and the recipe left out.

    Raises:
        DyditError: If ``out`` exists already, or the disk refuses.
    """
    content = report.to_json()
    with artifact_folder(out, overwrite=overwrite) as folder:
        write_json(folder / "profile.json", content)
        pictures = write_plots(folder, report.blocks, maps, report.title)
        if recipe_yaml is not None:
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        write_manifest(
            folder,
            stage="profile",
            settings=settings if settings is not None else report.settings,
            parent=parent,
            results={key: content[key] for key in SUMMARY},
            device=device,
        )
    return ["profile.json", *pictures]
