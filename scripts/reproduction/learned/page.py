"""The page about what was learned, from measured decisions alone."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.reproduction.learned.decisions import INSIDE, REGIONS, Decisions
from scripts.reproduction.learned.facts import CLEAR, FEW_POINTS, KINDS, NEARLY_NONE, Facts, preference, trend
from scripts.reproduction.learned.pictures import token_name

THIRDS = ("noisiest", "middle", "cleanest")
TITLES = {"width": "width", "heads": "heads", "groups": "groups", "tokens": "tokens", "macs": "MACs"}


def page(shown: Sequence[Decisions], measured: Sequence[tuple[Decisions, Facts]], command: str) -> str:
    """The page.

    Args:
        shown: The models of the pictures.
        measured: All models, with what their decisions say.
        command: That made it.
    """
    first = measured[0][0]
    parts = [
        "# What was learned",
        "",
        "What the routers of trained models decide, on held-out images of Fashion-MNIST: how wide blocks are at which noise, which tokens "
        "their MLPs see, and which blocks do nothing. The paper (arXiv 2410.03456) reports narrow blocks where the sample is noisy "
        "and wide ones near the image. This page is written by a script, numbers and judgements alike:",
        "",
        "```sh",
        command,
        "```",
        "",
        f"{first.images:,} held-out images, each at {len(first.noise)} noise levels that are evenly spaced in t; thresholds, as at "
        "inference. “Width” is the share of a block's attention and MLP MACs that its heads and groups leave, tokens aside.",
        "",
        *_answers(measured),
        "",
        "## Width against noise",
        "",
        "![width against noise](images/learned_width.png)",
        "",
        f"ρ is Spearman's rank correlation with the share of noise in the input: −1 is narrower at every step towards noise. "
        f"From {CLEAR:g} on it is called a trend.",
        "",
        *_correlations(measured),
        "",
        *_thirds(measured),
        "",
        "## Tokens",
        "",
        *(f"![tokens over images]({'images/' + token_name(found)})\n" for found in shown),
        "![garment and background](images/learned_regions.png)",
        "",
        f"A token is on the garment if {INSIDE:.0%} of its pixels or more are brighter than the black background, beside it if none is, "
        "and otherwise on the edge. Share of blocks whose MLP sees such a token, by thirds of the noise levels; differences from "
        f"{100 * FEW_POINTS:g} points on count as a preference:",
        "",
        *_regions(measured),
        "",
        "## Skipped blocks",
        "",
        "![blocks and noise](images/learned_blocks.png)",
        "",
        "One head and one group of each block are always on, so that no block is skipped entirely. Share of all pairs of block and noise "
        f"level where nothing else is on, where the MLP sees less than {NEARLY_NONE:.0%} of the tokens, and where both hold:",
        "",
        *_skipped(measured),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _answers(measured: Sequence[tuple[Decisions, Facts]]) -> list[str]:
    """In short: how many of the models do what."""
    trends = [trend(facts.correlations["width"]) for _, facts in measured]
    wants = [
        preference(float(facts.regions[:, 0].mean()), float(facts.regions[:, 2].mean()))
        for _, facts in measured
    ]
    skipping = sum(facts.skipped > 0 for _, facts in measured)
    total = len(measured)
    return [
        f"- Width: {_counted(trends, total)}.",
        f"- Tokens: {_counted(wants, total)}, over all noise levels.",
        f"- Blocks with least width and no tokens: at some noise level in {skipping} of {total} models.",
    ]


def _counted(words: Sequence[str], total: int) -> str:
    return "; ".join(f"{word}: {words.count(word)} of {total} models" for word in dict.fromkeys(words))


def _correlations(measured: Sequence[tuple[Decisions, Facts]]) -> list[str]:
    lines = [
        f"| | {' | '.join('ρ of ' + TITLES[kind] for kind in KINDS)} | width is | blocks that narrow / widen / neither |",
        "| --- |" + " ---: |" * len(KINDS) + " --- | ---: |",
    ]
    for found, facts in measured:
        values = [_signed(facts.correlations[kind]) for kind in KINDS]
        blocks = " / ".join(str(count) for count in facts.block_trends)
        lines.append(
            f"| {found.name} | {' | '.join(values)} | {trend(facts.correlations['width'])} | {blocks} |"
        )
    return lines


def _thirds(measured: Sequence[tuple[Decisions, Facts]]) -> list[str]:
    lines = [
        f"| noisiest → cleanest third | {' | '.join(TITLES[kind] for kind in KINDS)} | widest minus narrowest block, at most |",
        "| --- |" + " ---: |" * (len(KINDS) + 1),
    ]
    for found, facts in measured:
        values = [f"{facts.noisy[kind]:.0%} → {facts.clean[kind]:.0%}" for kind in KINDS]
        lines.append(f"| {found.name} | {' | '.join(values)} | {100 * facts.spread:.0f} points |")
    return lines


def _regions(measured: Sequence[tuple[Decisions, Facts]]) -> list[str]:
    lines = [
        f"| | noise | {' | '.join(REGIONS)} | |",
        "| --- | --- |" + " ---: |" * len(REGIONS) + " --- |",
    ]
    for found, facts in measured:
        for place, third in enumerate(THIRDS):
            rates = facts.regions[place]
            values = " | ".join(f"{rate:.0%}" for rate in rates)
            words = preference(float(rates[0]), float(rates[2]))
            noise = f"{third} third ({facts.noise_third[place]:.0%} on average)"
            lines.append(f"| {found.name if place == 0 else ''} | {noise} | {values} | {words} |")
    return lines


def _skipped(measured: Sequence[tuple[Decisions, Facts]]) -> list[str]:
    lines = [
        "| | least width | no tokens | both | blocks where both hold at some level | at every level |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for found, facts in measured:
        shares = [facts.narrowest, facts.no_tokens, facts.skipped]
        blocks = [_listed(facts.ever_skipped), _listed(facts.always_skipped)]
        lines.append(
            f"| {found.name} | {' | '.join(f'{share:.0%}' for share in shares)} | {' | '.join(blocks)} |"
        )
    return lines


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(str(block + 1) for block in blocks) or "none"


def _signed(value: float | None) -> str:
    return "constant" if value is None else f"{value:+.2f}".replace("-", "−")
