"""Pictures of decisions. The noisiest level stands on the left, where sampling begins, and levels are evenly spaced in t.

Colours are Okabe and Ito's, which stay apart for colour-blind eyes; shares run from paper to deep blue, even in lightness.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dydit_cli.artifacts import atomic_write
from dydit_cli.profiling.plots import FAINT, INK, RAMP
from scripts.reproduction.learned.decisions import REGIONS, Decisions
from scripts.reproduction.learned.facts import NEARLY_NONE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
COLOURS = 256
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
NOISE_LABEL = "noise in the input (sampling runs left to right)"
PANELS = (
    ("heads", "attention heads", BLUE),
    ("groups", "channel groups", GREEN),
    ("tokens", "tokens in the MLP", ORANGE),
    ("macs", "attention and MLP MACs", VERMILLION),
)
REGION_STYLES = {"garment": (VERMILLION, "-"), "edge": (FAINT, "--"), "background": (BLUE, "-")}


def draw(shown: Sequence[Decisions], folder: Path) -> list[str]:
    """Write all pictures of some models; their names."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "learned_width.png": width_figure(shown),
        "learned_blocks.png": blocks_figure(shown),
        "learned_regions.png": regions_figure(shown),
        **{token_name(found): tokens_figure(found) for found in shown},
    }
    with_greys = {token_name(found) for found in shown}
    for name, figure in figures.items():
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
        with atomic_write(folder / name) as temporary:
            picture = Image.open(drawn).convert("RGB")
            if name not in with_greys:
                # A palette saves most of the bytes; greys of pictures would leave it too few colours.
                picture = picture.quantize(COLOURS, dither=Image.Dither.NONE)
            picture.save(temporary, format="png", optimize=True)
    return list(figures)


def token_name(found: Decisions) -> str:
    """The picture of a model's tokens."""
    return f"learned_tokens_{found.family}.png"


def width_figure(shown: Sequence[Decisions]) -> Figure:
    """Shares that are on against noise: mean over blocks, every block, and the range between the extremes."""
    figure = _figure(11.5, 2.85 * len(shown) + 0.35)
    rows = figure.subplots(len(shown), len(PANELS), squeeze=False, sharey=True)
    for row, found in zip(rows, shown, strict=True):
        places = np.arange(len(found.noise))
        for axes, (kind, title, colour) in zip(row, PANELS, strict=True):
            values = getattr(found, kind)
            axes.fill_between(places, values.min(1), values.max(1), color=colour, alpha=0.13, lw=0)
            axes.plot(places, values, color=colour, lw=0.7, alpha=0.45)
            axes.plot(places, values.mean(1), color=colour, lw=2.6)
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_ylim(0, 1.03)
            axes.set_yticks((0, 0.25, 0.5, 0.75, 1), labels=("0", "25 %", "50 %", "75 %", "100 %"))
            _noise_axis(axes, found.noise)
        row[0].set_ylabel(f"{found.name}\nshare that is on", fontsize=9.5, color=INK)
    figure.supxlabel(
        f"{NOISE_LABEL}; thick: mean over blocks, thin: single blocks, shade: between the extremes",
        fontsize=9,
        color=FAINT,
    )
    return figure


def blocks_figure(shown: Sequence[Decisions]) -> Figure:
    """Heat maps of block against noise; crosses where nothing is on but what always is."""
    depth = max(found.width.shape[1] for found in shown)
    figure = _figure(11.5, (1.15 + 0.27 * max(6, depth)) * len(shown) + 0.4)
    rows = figure.subplots(len(shown), 3, squeeze=False, sharey="row")
    image: Any = None
    for row, found in zip(rows, shown, strict=True):
        for axes, (kind, title, _) in zip(row, PANELS[:3], strict=True):
            values = getattr(found, kind).T
            image = axes.imshow(values, aspect="auto", cmap=_ramp(), vmin=0, vmax=1, interpolation="nearest")
            marked = (found.tokens < NEARLY_NONE if kind == "tokens" else found.narrowest).T
            blocks, levels = np.nonzero(marked)
            axes.plot(levels, blocks, ls="", marker="x", ms=4.5, mew=1.1, color=VERMILLION)
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_yticks(range(len(values)), labels=[str(number + 1) for number in range(len(values))])
            _noise_axis(axes, found.noise, grid=False)
        row[0].set_ylabel(f"{found.name}\nblock", fontsize=9.5, color=INK)
    scale = figure.colorbar(image, ax=rows, ticks=(0, 0.25, 0.5, 0.75, 1), shrink=0.85, pad=0.012, aspect=32)
    scale.ax.set_yticklabels(("0", "25 %", "50 %", "75 %", "100 %"), fontsize=8, color=FAINT)
    scale.set_label("share that is on", fontsize=9, color=FAINT)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0)
    figure.supxlabel(
        f"{NOISE_LABEL}; crosses: only the head and the group that are always on, or less than 1 % of the tokens",
        fontsize=9,
        color=FAINT,
    )
    return figure


def regions_figure(shown: Sequence[Decisions]) -> Figure:
    """How many tokens enter the MLPs on the garment and beside it, against noise."""
    figure = _figure(4.4 * len(shown) + 0.6, 3.3)
    row = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, found in zip(row, shown, strict=True):
        for place, region in enumerate(REGIONS):
            colour, style = REGION_STYLES[region]
            label = f"{region} ({found.region_sizes[place]:.0%} of the tokens)"
            axes.plot(found.regions[:, place], color=colour, ls=style, lw=2, label=label)
        axes.set_ylim(0, 1.03)
        axes.set_yticks((0, 0.25, 0.5, 0.75, 1), labels=("0", "25 %", "50 %", "75 %", "100 %"))
        axes.set_title(found.name, fontsize=10, color=INK)
        axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=INK)
        _noise_axis(axes, found.noise)
    row[0].set_ylabel("share of blocks whose MLP\nsees a token", fontsize=9.5, color=INK)
    figure.supxlabel(NOISE_LABEL, fontsize=9, color=FAINT)
    return figure


def tokens_figure(found: Decisions) -> Figure:
    """Images of several classes: clean, and at each level the input and the share of blocks that keep each token."""
    maps = found.maps
    images, levels = maps.kept.shape[:2]
    figure = _figure(1.08 * images + 2.0, 1.02 * (1 + 2 * levels) + 0.75)
    rows = figure.subplots(1 + 2 * levels, images, squeeze=False)
    shown: Any = None
    for column in range(images):
        _picture(rows[0, column], maps.clean[column, 0])
        for level in range(levels):
            _picture(rows[1 + 2 * level, column], maps.noised[column, level, 0])
            shown = rows[2 + 2 * level, column].imshow(
                maps.kept[column, level], cmap=_ramp(), vmin=0, vmax=1, interpolation="nearest"
            )
    for axes in rows.flat:
        axes.set_xticks(())
        axes.set_yticks(())
        for side in axes.spines.values():
            side.set_edgecolor("#d9dee3")
    label = {"fontsize": 8.5, "color": INK, "rotation": 0, "ha": "right", "va": "center", "labelpad": 6}
    rows[0, 0].set_ylabel("image", **label)
    for level in range(levels):
        rows[1 + 2 * level, 0].set_ylabel(f"{_percent(float(maps.noise_level[level]))} noise", **label)
        rows[2 + 2 * level, 0].set_ylabel("tokens kept", **label)
    scale = figure.colorbar(shown, ax=rows, ticks=(0, 0.25, 0.5, 0.75, 1), shrink=0.6, pad=0.015, aspect=40)
    scale.ax.set_yticklabels(("0", "25 %", "50 %", "75 %", "100 %"), fontsize=8, color=FAINT)
    scale.set_label("share of blocks whose MLP sees the token", fontsize=9, color=FAINT)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0)
    figure.suptitle(f"Tokens over images: {found.name}", fontsize=10.5, color=INK)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _ramp() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("dydit", RAMP)


def _noise_axis(axes: Axes, noise: np.ndarray, *, grid: bool = True) -> None:
    ticks = np.linspace(0, len(noise) - 1, 4).round().astype(int)
    axes.set_xticks(ticks, labels=[_percent(noise[tick]) for tick in ticks])
    axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    # What stands at an end stays inside, away from the next panel.
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    for name, side in axes.spines.items():
        side.set_visible(grid and name in ("left", "bottom"))
        side.set_color("#c9d1d9")
    if grid:
        axes.grid(axis="y", color="#e7ebef", lw=0.8)
        axes.set_axisbelow(True)


def _picture(axes: Axes, image: Any) -> None:
    axes.imshow(np.asarray(image).clip(-1, 1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")


def _percent(share: float) -> str:
    if share > 0.9995:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if share > 0.99 or share < 0.01 else f"{100 * share:.0f} %"
