"""The README's picture: samples of the static and the dynamic model from the same noise, beside what the dynamic one computes.

    dydit demo --family flux --out runs/demo
    python scripts/readme_picture.py runs/demo docs/images/overview.png

Everything in it comes out of the demo's folder: `samples-static/`, `samples/`, `profile/profile.json` and `summary.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dydit_cli.artifacts import atomic_write
from dydit_cli.profiling.plots import FAINT, INK, RAMP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, ROWS, GAP_PX = 10, 3, 2
KINDS = {"heads": "attention heads", "groups": "MLP channels", "tokens": "tokens"}


def mosaic(samples: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) as a sheet of the first rows, with a gap between them."""
    images = samples[: COLUMNS * ROWS]
    height, width = images.shape[1:3]
    sheet = np.full(
        (ROWS * (height + GAP_PX) - GAP_PX, COLUMNS * (width + GAP_PX) - GAP_PX, 3), 255, np.uint8
    )
    for place, image in enumerate(images):
        top, left = place // COLUMNS * (height + GAP_PX), place % COLUMNS * (width + GAP_PX)
        sheet[top : top + height, left : left + width] = image
    return sheet


def draw(demo: Path, file: Path) -> None:
    """Draw the picture of a demo's folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    profile = json.loads((demo / "profile" / "profile.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(11.0, 4.5), facecolor="white")
    FigureCanvasAgg(figure)
    done = summary["trajectory_ratio"] or summary["models"]["dynamic"]["ratio"]
    for top, folder, title in (
        (0.53, "samples-static", "the complete model"),
        (0.04, "samples", f"the same model made dynamic, same noise: {done:.0%} of attention and MLP"),
    ):
        with np.load(demo / folder / "samples.npz") as archive:
            sheet = mosaic(archive["arr_0"])
        axes = figure.add_axes((0.01, top, 0.52, 0.39))
        axes.imshow(sheet, interpolation="nearest", aspect="equal")
        axes.set_axis_off()
        axes.set_anchor("NW")
        axes.set_title(title, loc="left", fontsize=10, color=INK, pad=5)
    figure.text(0.56, 0.935, "what it computes, from noise to image", fontsize=10, color=INK)
    for number, (kind, title) in enumerate(KINDS.items()):
        _map(
            figure.add_axes((0.595, 0.675 - 0.285 * number, 0.385, 0.205)),
            profile["blocks"],
            kind,
            title,
            last=number == 2,
        )
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=140, facecolor="white")


def _map(axes: Axes, blocks: Mapping[str, Any], kind: str, title: str, *, last: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    order = np.argsort(blocks["noise_level"])[::-1]
    shares = np.asarray(blocks[kind], dtype=float)[order].T
    axes.imshow(
        shares,
        aspect="auto",
        cmap=LinearSegmentedColormap.from_list("share", RAMP),
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_title(f"{title}: {shares.mean():.0%} on average", loc="left", fontsize=8.5, color=FAINT, pad=3)
    axes.set_ylabel("block", fontsize=8, color=FAINT)
    axes.set_yticks([0, len(shares) - 1], ["first", "last"], fontsize=7, color=FAINT)
    noise = np.asarray(blocks["noise_level"])[order]
    places = [0, len(noise) // 2, len(noise) - 1]
    axes.set_xticks(
        places, [f"{noise[place]:.0%} noise" for place in places] if last else [], fontsize=7, color=FAINT
    )
    axes.tick_params(length=0)
    for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=False):
        label.set_horizontalalignment(side)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture of the folder that was named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder of `dydit demo`")
    parser.add_argument("file", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    draw(options.demo, options.file)


if __name__ == "__main__":
    main()
