"""What a report shows, as plain values: gathered from a profile, a model, samples and manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dydit_cli.artifacts.ancestry import ancestors, manifest_of, words_of
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.profiling.profile import ProfileReport
from dydit_cli.profiling.token_maps import TokenMaps
from dydit_cli.reporting.cost import cost_rows, facts_of, verdict
from dydit_cli.reporting.pictures import bits, limits_of, picture, png, shares

MOST_BITS = 12_000_000
"""Of token masks block by block; where there are more, the page has their means over the blocks alone."""

MANIFEST_KEYS = ("stage", "device", "threads", "commit", "weights_sha256")


@dataclass(frozen=True)
class SampleRow:
    """Samples of one model.

    Attributes:
        title: What drew them.
        images: (N, H, W, 3) bytes, or (N, F, H, W, 3) of videos.
    """

    title: str
    images: NDArray


@dataclass(frozen=True)
class Samples:
    """Samples of several models from the same noise.

    Attributes:
        rows: One a model; image i has the same noise in each.
        labels: What each image is of.
        note: How they were drawn.
    """

    rows: tuple[SampleRow, ...]
    labels: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Content:
    """Everything on the page.

    Attributes:
        title, subtitle: The heading.
        verdict: What the numbers say, in a sentence or two.
        cost: Shares of the static model: claimed, counted, measured; see `cost_rows`.
        facts: On which machine and with what, name and words.
        profile: Shares by noise level and block.
        units: Which heads and groups are on at each noise level; None of a static model.
        tokens: Samples at many noise levels and the tokens that are kept there, or None.
        samples: Of static and dynamic execution, or None.
        models: A table of what became of several models (of the demo), or None.
        lineage: Stages, the last one first.
        settings: Of the last stage.
        recipe: YAML, or None.
        versions: Of packages.
        made: When, and by which version.
    """

    title: str
    subtitle: str
    verdict: str
    cost: list[dict[str, Any]]
    facts: list[tuple[str, str]]
    profile: dict[str, Any]
    units: dict[str, Any] | None
    tokens: dict[str, Any] | None
    samples: dict[str, Any] | None
    models: list[dict[str, Any]] | None
    lineage: list[dict[str, Any]]
    settings: dict[str, Any]
    recipe: str | None
    versions: dict[str, str]
    made: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def gather(
    report: ProfileReport,
    model: DynamicModel,
    *,
    folder: str | Path | None,
    maps: TokenMaps | None = None,
    samples: Samples | None = None,
    models: Sequence[Mapping[str, Any]] | None = None,
    recipe_yaml: str | None = None,
) -> Content:
    """Gather what the page shows.

    Args:
        report: Of `profile`.
        model: That was profiled.
        folder: The model's, whose manifests tell its past; None of a preset.
        maps: Of `token_maps`, at as many levels as the slider is to have.
        samples: From the same noise.
        models: Rows of a table that compares models, where several were made.
        recipe_yaml: Of the run.
    """
    manifest = {} if folder is None else manifest_of(Path(folder)) or {}
    own = Path(folder) / "recipe.yaml" if folder is not None else None
    if recipe_yaml is None and own is not None and own.is_file():
        recipe_yaml = own.read_text(encoding="utf-8")
    static = report.model["execution"] == "static"
    target = (manifest.get("settings") or {}).get("target_ratio")
    return Content(
        title=f"{report.model['title']}, {_blocks(report)} of {report.model['hidden_size']} channels",
        subtitle=str(folder) if folder is not None else "a published size with fresh weights",
        verdict=verdict(report, target),
        cost=cost_rows(report, target),
        facts=facts_of(report),
        profile=_profile(report),
        units=None if static else _units(model, report),
        tokens=None if maps is None else _tokens(maps, report),
        samples=None if samples is None else _samples(samples),
        models=None if models is None else [dict(row) for row in models],
        lineage=_lineage(manifest, folder),
        settings=dict(manifest.get("settings") or {}),
        recipe=recipe_yaml,
        versions=dict(manifest.get("versions") or report.versions),
        made={
            "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "by": f"dydit {report.versions.get('dydit', '')}".rstrip(),
        },
    )


def _blocks(report: ProfileReport) -> str:
    double = report.model.get("num_double")
    depth = report.model["depth"]
    return f"{depth} blocks" if double is None else f"{double} + {depth - double} blocks"


def _profile(report: ProfileReport) -> dict[str, Any]:
    model = report.model
    return {
        "t": report.blocks.t,
        "noise": report.blocks.noise_level,
        "heads": report.blocks.heads,
        "groups": report.blocks.groups,
        "tokens": report.blocks.tokens,
        "ratio": [row.ratio for row in report.timesteps],
        "gmacs": [row.gmacs for row in report.timesteps],
        "counts": {
            "heads": model["num_heads"],
            "groups": model["num_groups"],
            "tokens": model["num_tokens"],
        },
        "double": model.get("num_double"),
        "depth": model["depth"],
        "images": (report.inputs or {}).get("images"),
        "note": (report.inputs or {}).get("note"),
        "real": (report.inputs or {}).get("real"),
        "video": bool(model.get("num_frames")),
    }


@torch.no_grad()
def _units(model: DynamicModel, report: ProfileReport) -> dict[str, Any] | None:
    """(T, L, units) masks of heads and groups, by rank: they depend on t alone and need no sample."""
    times = torch.tensor(report.blocks.t, dtype=torch.float32)
    routing = model.routing(times).cpu()
    found: dict[str, Any] = {}
    for name in ("heads", "groups"):
        masks = [getattr(block, name) for block in routing.blocks]
        if len({mask.shape for mask in masks}) != 1:
            return None  # blocks of different sizes have no common map
        stacked = torch.stack(masks, dim=1) > 0.5
        found[name] = {"shape": list(stacked.shape), "bits": bits(stacked)}
    return found


def _tokens(maps: TokenMaps, report: ProfileReport) -> dict[str, Any]:
    limits = limits_of(maps.clean)
    count, levels, depth, *grid = maps.masks.shape
    clean = [png(picture(sample, limits)) for sample in maps.clean]
    noised = [[png(picture(state, limits)) for state in states] for states in maps.noised]
    titles = [f"class {label}" for label in maps.labels] or [
        f"sample {number + 1}" for number in range(count)
    ]
    if maps.frames is not None:
        titles = [f"frame {number + 1}" for number in maps.frames]
    blockwise = maps.masks.numel() <= MOST_BITS
    return {
        "t": maps.t.tolist(),
        "noise": maps.noise_level.tolist(),
        "shape": [count, levels, depth, *grid],
        "titles": titles,
        "clean": clean,
        "noised": noised,
        "kept": shares(maps.kept),
        "masks": bits(maps.masks) if blockwise else None,
        "pixelated": max(maps.clean.shape[-2:]) <= 96,
        "latents": int(maps.clean.shape[1]) not in (1, 3),
    }


def _samples(samples: Samples) -> dict[str, Any]:
    rows = []
    for row in samples.rows:
        images = row.images
        if images.ndim == 5:
            # A video is a strip of its frames, from left to right.
            images = np.concatenate(list(images.transpose(1, 0, 2, 3, 4)), axis=2)
        rows.append({"title": row.title, "images": [png(image) for image in images]})
    height, width = samples.rows[0].images.shape[-3:-1]
    return {
        "rows": rows,
        "labels": list(samples.labels),
        "note": samples.note,
        "video": samples.rows[0].images.ndim == 5,
        "pixelated": max(height, width) <= 96,
    }


def _lineage(manifest: Mapping[str, Any], folder: str | Path | None) -> list[dict[str, Any]]:
    if not manifest:
        return []
    here = {
        "stage": manifest.get("stage"),
        "path": str(folder),
        "words": words_of(manifest),
        "sha256": manifest.get("weights_sha256"),
        "state": "present",
    }
    return [here, *(asdict(each) for each in ancestors(manifest))]
