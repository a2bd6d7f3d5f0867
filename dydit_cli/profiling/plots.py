"""Pictures of a profile: what is on by noise level and block, and where in an image tokens are kept.

The noisiest level stands on the left, where sampling begins. Colours always run from 0 to 1, so that pictures of two models can be
laid side by side. matplotlib is used without its global state: no window system, no settings of the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dydit_cli.artifacts import writing
from dydit_cli.profiling.shares import BlockShares
from dydit_cli.profiling.token_maps import TokenMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

DPI = 160
INK, FAINT = "#22303c", "#8a97a3"
RAMP = ("#f3f1ea", "#bfd8d2", "#6fb3b8", "#2c7c94", "#0f3f5c")
"""Paper to deep blue: even steps of lightness, so that it also reads in grey."""

KINDS = {
    "heads": ("Attention heads", "share of heads that are on"),
    "groups": ("MLP channel groups", "share of channel groups that are on"),
    "tokens": ("MLP tokens", "share of tokens that enter the MLP"),
}

GREY: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}

SCALE = ("0", "25%", "50%", "75%", "100%")

PERCENTILES = (1, 99)

GAP = 0.15
"""Inches between a heat map and the line above it."""


def write_plots(folder: Path, blocks: BlockShares, maps: TokenMaps | None, model_title: str) -> list[str]:
    """Write ``heads.png``, ``groups.png``, ``tokens.png`` and, where there are images, ``token_maps.png``.

    Args:
        folder: Where to.
        blocks: Shares by timestep and block.
        maps: Images and their tokens, or None.
        model_title: Named in the headings.

    Returns:
        Names of the files.
    """
    figures = {kind: block_figure(kind, blocks, model_title) for kind in KINDS}
    if maps is not None:
        figures["token_maps"] = token_figure(maps, model_title)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with writing(path):
            figure.savefig(path, dpi=DPI, facecolor="white")
    return [f"{name}.png" for name in figures]


def block_figure(kind: str, blocks: BlockShares, model_title: str) -> Figure:
    """A heat map of noise level × block, with the means over blocks above it and over noise levels beside it.

    Args:
        kind: ``heads``, ``groups`` or ``tokens``.
        blocks: Shares by timestep and block.
        model_title: Named in the heading.
    """
    title, meaning = KINDS[kind]
    order = np.argsort(blocks.noise_level)[::-1]
    values = np.asarray(getattr(blocks, kind), dtype=float)[order].T
    depth, levels = values.shape
    height = min(9.0, 2.6 + 0.26 * max(depth, 6))
    figure = _figure(9.0, height)
    grid = figure.add_gridspec(
        2,
        3,
        width_ratios=(1, 0.13, 0.022),
        height_ratios=(0.75, height - 2.3),
        left=0.075,
        right=0.925,
        top=1 - 0.82 / height,
        bottom=0.82 / height,
        wspace=0.05,
        hspace=2 * GAP / (height - 1.55),
    )
    main = figure.add_subplot(grid[1, 0])
    image = main.imshow(values, aspect="auto", cmap=_ramp(), vmin=0, vmax=1, interpolation="nearest")
    _timestep_axis(main, np.asarray(blocks.t)[order], np.asarray(blocks.noise_level)[order])
    main.set_ylabel("block")
    main.set_yticks(range(0, depth, 1 if depth <= 14 else 2))
    _mean_line(figure.add_subplot(grid[0, 0]), values.mean(axis=0), levels)
    _mean_bars(figure.add_subplot(grid[1, 1]), values.mean(axis=1), depth)
    scale = figure.colorbar(image, cax=figure.add_subplot(grid[1, 2]), ticks=(0, 0.25, 0.5, 0.75, 1))
    scale.ax.set_yticklabels(SCALE)
    scale.ax.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    _plain(scale.ax)
    scale.outline.set_visible(False)
    _heading(figure, height, f"{title}, {model_title}", f"{meaning}; {values.mean():.0%} on average")
    return figure


def token_figure(maps: TokenMaps, model_title: str) -> Figure:
    """Images or frames as they fade from noise to data, and under each the share of blocks in which each token is kept."""
    images, levels = maps.kept.shape[:2]
    cell, left, top, bottom = 1.16, 0.2, 1.02, 0.55
    columns = levels + 1
    width, height = left + cell * columns + 0.85, top + bottom + images * 2 * cell
    figure = _figure(width, height)
    rows = figure.add_gridspec(
        images,
        1,
        left=left / width,
        right=(left + cell * columns) / width,
        top=1 - top / height,
        bottom=bottom / height,
        hspace=0.07,
    )
    shown: Any = None
    for row in range(images):
        limits = _limits(maps.clean[row])
        grid = rows[row].subgridspec(2, columns, wspace=0.05, hspace=0.05)
        whole = figure.add_subplot(grid[:, 0])
        whole.imshow(_picture(maps.clean[row], limits), **GREY)
        _bare(whole)
        if maps.frames is not None:
            whole.set_title(f"frame {maps.frames[row] + 1}", fontsize=9, color=INK, pad=5)
        elif row == 0:
            whole.set_title("image", fontsize=9, color=INK, pad=5)
        for column in range(levels):
            above = figure.add_subplot(grid[0, column + 1])
            below = figure.add_subplot(grid[1, column + 1])
            above.imshow(_picture(maps.noised[row, column], limits), **GREY)
            shown = below.imshow(
                maps.kept[row, column], cmap=_ramp(), vmin=0, vmax=1, interpolation="nearest"
            )
            for axes in (above, below):
                _bare(axes)
            if row == 0:
                noise = _percent(float(maps.noise_level[column]))
                above.set_title(f"{noise} noise", fontsize=9, color=INK, pad=5)
            if row == images - 1:
                below.set_xlabel(
                    f"t = {_number(float(maps.t[column]))}", fontsize=8.5, color=FAINT, labelpad=5
                )
    scale = figure.colorbar(
        shown,
        cax=figure.add_axes(
            (
                (left + cell * columns + 0.12) / width,
                bottom / height,
                0.12 / width,
                1 - (top + bottom) / height,
            )
        ),
        ticks=(0, 0.25, 0.5, 0.75, 1),
    )
    scale.ax.set_yticklabels(SCALE)
    scale.ax.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    scale.outline.set_visible(False)
    mean = float(maps.kept.mean())
    _heading(
        figure,
        height,
        f"Tokens over {'an image' if maps.frames is None else 'a video'}, {model_title}",
        f"above the model's input, below it the share of blocks whose MLP sees each token; {mean:.0%} on average",
    )
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _ramp() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("dydit", RAMP)


def _heading(figure: Figure, height: float, title: str, subtitle: str) -> None:
    figure.text(0.02, 1 - 0.16 / height, title, fontsize=12.5, fontweight="bold", color=INK, va="top")
    figure.text(0.02, 1 - 0.43 / height, subtitle, fontsize=9, color=FAINT, va="top")


def _timestep_axis(axes: Axes, t: np.ndarray, noise_level: np.ndarray) -> None:
    ticks = _ticks(len(t), 8)
    axes.set_xticks(ticks)
    axes.set_xticklabels(
        [f"{_number(t[tick])}\n{_percent(noise_level[tick])}" for tick in ticks], linespacing=1.5
    )
    axes.set_xlabel("timestep, and below it the noise in the input", labelpad=6)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK, pad=5)
    axes.xaxis.label.set(color=FAINT, size=9)
    axes.yaxis.label.set(color=FAINT, size=9)
    _plain(axes)


def _mean_line(axes: Axes, means: np.ndarray, levels: int) -> None:
    edges = np.arange(levels + 1) - 0.5
    axes.stairs(means, edges, fill=True, color=RAMP[2], alpha=0.35)
    axes.stairs(means, edges, baseline=None, color=RAMP[3], linewidth=1.4)
    axes.set(xlim=(-0.5, levels - 0.5), ylim=(0, 1.05), xticks=())
    axes.set_yticks((0, 1), labels=("0", "1"))
    axes.set_ylabel("mean", color=FAINT, fontsize=8.5)
    axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    _plain(axes)


def _mean_bars(axes: Axes, means: np.ndarray, depth: int) -> None:
    axes.barh(np.arange(depth), means, height=0.62, color=RAMP[2])
    for place, mean in enumerate(means):
        if depth <= 30:
            axes.text(0.04, place, f"{mean:.0%}", va="center", fontsize=7, color=INK)
    axes.set(ylim=(depth - 0.5, -0.5), xlim=(0, 1), yticks=(), xticks=())
    _plain(axes)


def _plain(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


def _bare(axes: Axes) -> None:
    axes.set(xticks=(), yticks=())
    for spine in axes.spines.values():
        spine.set(color="#d5dade", linewidth=0.6)


def _ticks(count: int, most: int) -> list[int]:
    """At most ``most`` evenly spaced places of ``count``, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)})


def _limits(clean: Tensor) -> tuple[float, float]:
    """Values shown as black and white: images are in [-1, 1], latents reach further."""
    if float(clean.abs().max()) <= 1:
        return -1.0, 1.0
    low, high = np.percentile(clean.numpy(), PERCENTILES)
    return float(low), float(high)


def _picture(sample: Tensor, limits: Sequence[float]) -> np.ndarray:
    """(C, h, w) -> (h, w) or (h, w, 3) in [0, 1]; of latents the first three channels, which look enough like the image."""
    low, high = limits
    scaled = ((sample - low) / (high - low)).clamp(0, 1)
    shown = scaled[0] if len(scaled) < 3 else scaled[:3].permute(1, 2, 0)
    picture: np.ndarray = shown.numpy()
    return picture


def _number(value: float) -> str:
    return f"{value:.0f}" if value > 1 or value == 0 else f"{value:.2f}"


def _percent(share: float) -> str:
    """In whole per cent, and in tenths where that would round up to everything."""
    return f"{share:.1%}" if 0.995 <= share < 0.9995 else f"{share:.0%}"
