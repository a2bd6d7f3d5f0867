"""The hypotheses, and how a table decides about them. Nothing here reads a file.

Distances are compared as ratios of means over seeds. The 95 % interval of a ratio comes from the spread over seeds (Student's t on
the logarithm, Welch's degrees of freedom); a row with one seed is given the relative spread of the rows that have several, which is said
in its verdict. A verdict is reached when every cell that it rests on has run, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

T_95 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    11: 2.201,
    12: 2.179,
    15: 2.131,
    20: 2.086,
    30: 2.042,
}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom (a table of statistics)."""

MMACS_TOLERANCE = 0.01
"""Within which MACs count as equal."""

CLAIMED = {"dit": ("H1", "H2", "H3", "H4"), "sit": ("H1", "H2")}
"""The hypotheses of each family."""

Outcome = Literal["held", "missed", "undecided", "not measured"]


@dataclass(frozen=True)
class Row:
    """A row of the table: one arm at one ratio.

    Attributes:
        distances: Fréchet distances, one a seed.
        sampling_std: Standard deviation of one of them by the number of samples alone.
        gmacs: Of a forward as executed, mean over the seeds.
        ratio: Executed share of attention and MLP on held-out samples; None for what was not trained.
        trajectory_ratio: The same on the sampler's own ways.
        seconds_per_image: Measured side by side; None if it was not.
        time_ratio: Time over that of the static control, None if it was not measured.
        rate: Learning rate.
        seeds: Of the cells.
    """

    distances: tuple[float, ...]
    sampling_std: float
    gmacs: float
    ratio: float | None
    trajectory_ratio: float | None
    seconds_per_image: float | None
    time_ratio: float | None
    rate: float | None
    seeds: tuple[int, ...]

    @property
    def fd(self) -> float:
        """The mean over seeds."""
        return fmean(self.distances)

    @property
    def fd_std(self) -> float:
        """Over seeds; by sampling alone where there is one seed."""
        return stdev(self.distances) if len(self.distances) > 1 else self.sampling_std

    @property
    def fd_std_of(self) -> str:
        """What `fd_std` is a standard deviation of."""
        return f"{len(self.distances)} seeds" if len(self.distances) > 1 else "sampling alone, one seed"


RowKey = tuple[str, str, float, str]
Table = Mapping[RowKey, Row]
Planned = Mapping[RowKey, int]
"""Seeds of each row that the protocol asks for."""


@dataclass(frozen=True)
class Spread:
    """How much a distance differs from seed to seed.

    Attributes:
        relative: Standard deviation over the mean.
        freedom: Degrees of freedom of that estimate.
    """

    relative: float
    freedom: int


@dataclass(frozen=True)
class Comparison:
    """A ratio of two rows' distances with its 95 % interval."""

    ratio: float
    low: float
    high: float
    borrowed: bool


@dataclass(frozen=True)
class Verdict:
    """What became of a hypothesis.

    Attributes:
        name: Short.
        statement: What was claimed beforehand.
        outcome: ``held`` if the whole interval fulfils it, ``missed`` if none of it does, else ``undecided``; ``not measured`` while
            cells that it rests on have not run.
        text: The numbers, and what is still to come.
        ratio: Of distances, with its interval; None if not measured.
    """

    name: str
    statement: str
    outcome: Outcome
    text: str
    ratio: tuple[float, float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def student(freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t, for the next lower degrees of freedom that the table has."""
    return T_95[max(known for known in T_95 if known <= max(1.0, freedom))]


def pooled_spread(table: Table) -> Spread | None:
    """The spread over seeds of the rows that have several, by their degrees of freedom; None if no row has."""
    found = [
        (row.fd_std / row.fd, len(row.distances) - 1) for row in table.values() if len(row.distances) > 1
    ]
    freedom = sum(count for _, count in found)
    if not freedom:
        return None
    return Spread(math.sqrt(sum(count * value**2 for value, count in found) / freedom), freedom)


def compare(above: Row, below: Row, spread: Spread | None) -> Comparison | None:
    """The ratio of two mean distances.

    Args:
        above: The numerator.
        below: The denominator.
        spread: Of rows of one seed.

    Returns:
        The ratio and its interval; None where a row has one seed and no spread is known.
    """
    # Variances of the logarithms of both means, each with its degrees of freedom; what is borrowed is one estimate, however often.
    parts, borrowed = [], 0.0
    for row in (above, below):
        count = len(row.distances)
        if count > 1:
            parts.append(((row.fd_std / row.fd) ** 2 / count, count - 1))
        elif spread is None:
            return None
        else:
            borrowed += spread.relative**2
    if borrowed and spread is not None:
        parts.append((borrowed, spread.freedom))
    variance = sum(value for value, _ in parts)
    welch = sum(value**2 / freedom for value, freedom in parts)
    ratio = above.fd / below.fd
    half = student(variance**2 / welch) * math.sqrt(variance) if variance else 0.0
    return Comparison(ratio, ratio * math.exp(-half), ratio * math.exp(half), bool(borrowed))


def best_pruning(table: Table, family: str, ratio: float) -> tuple[str, Row] | None:
    """The pruning with the least distance: chosen after the fact, in favour of the baseline. Remedied ones are left out."""
    found = [
        (key[1], row)
        for key, row in table.items()
        if key[0] == family and _is_plain_pruning(key) and key[2] == ratio
    ]
    return min(found, key=lambda item: item[1].fd) if found else None


def verdicts(table: Table, family: str = "dit", planned: Planned | None = None) -> list[Verdict]:
    """All verdicts of the protocol on a family.

    Args:
        table: What has run.
        family: ``dit`` or ``sit``.
        planned: What every row needs before a verdict rests on it; what there is, if not given.
    """
    planned = planned or {}
    control, half = (family, "static-control", 1.0, ""), (family, "dynamic", 0.5, "")
    pruned = best_pruning(table, family, 0.5)
    prunings = [key for key in planned if key[0] == family and key[2] == 0.5 and _is_plain_pruning(key)]
    best = (family, pruned[0], 0.5, "") if pruned else (family, "pruned", 0.5, "")
    claims = {
        "H1": _Claim("λ = 0.5 is within 10 % of the static control's Fréchet distance", half, control, 1.10),
        "H2": _Claim(
            "the best static pruning at the MACs of λ = 0.5 has at least 1.5 times its distance",
            best,
            half,
            1.5,
            at_least=True,
            beside=tuple(prunings),
        ),
        "H3": _Claim(
            "λ = 0.3 is within 40 % of the static control's distance",
            (family, "dynamic", 0.3, ""),
            control,
            1.40,
        ),
        "H4": _Claim(
            "TD-LoRA at λ = 0.5 is within 10 % of full fine-tuning", (family, "td-lora", 0.5, ""), half, 1.10
        ),
    }
    spread = pooled_spread(table)
    found = [_judged(name, claims[name], table, planned, spread) for name in CLAIMED[family]]
    return [*found, _equal_cost(table, family, planned)]


@dataclass(frozen=True)
class _Claim:
    """That one row's distance is at most (or at least) so many times another's; ``beside`` are rows that it rests on as well."""

    statement: str
    above: RowKey
    below: RowKey
    limit: float
    at_least: bool = False
    beside: tuple[RowKey, ...] = ()


def _judged(name: str, claim: _Claim, table: Table, planned: Planned, spread: Spread | None) -> Verdict:
    above, below = table.get(claim.above), table.get(claim.below)
    if above is None or below is None:
        return Verdict(name, claim.statement, "not measured", "not measured")
    missing = to_come((claim.above, claim.below, *claim.beside), table, planned)
    found = compare(above, below, spread)
    if found is None:
        text = f"{above.fd:.3f} / {below.fd:.3f} = {above.fd / below.fd:.3f}; one seed, whose spread is not known"
        return Verdict(
            name, claim.statement, "not measured" if missing else "undecided", text + _rest(missing)
        )
    if claim.at_least:
        outcome: Outcome = (
            "held" if found.low >= claim.limit else "missed" if found.high < claim.limit else "undecided"
        )
    else:
        outcome = (
            "held" if found.high <= claim.limit else "missed" if found.low > claim.limit else "undecided"
        )
    return Verdict(
        name,
        claim.statement,
        "not measured" if missing else outcome,
        _numbers(above, below, found) + _rest(missing),
        (found.ratio, found.low, found.high),
    )


def to_come(rows: Sequence[RowKey], table: Table, planned: Planned) -> list[str]:
    """Rows of which cells have not run, each with how many have."""
    found = []
    for key in dict.fromkeys(rows):
        have, asked = len(table[key].distances) if key in table else 0, planned.get(key, 0)
        if have < asked:
            seeds = f"{have} of {asked} seeds" if have else "not run"
            found.append(f"{key[1]}{'' if key[2] == 1 else f' {key[2]:g}'} ({seeds})")
    return found


def _is_plain_pruning(key: RowKey) -> bool:
    """Whether a row is of a pruning that the protocol planned, not one that a remedy was given to."""
    return key[1].startswith("pruned-") and not key[3]


def _rest(missing: Sequence[str]) -> str:
    return f" so far; to come: {', '.join(missing)}" if missing else ""


def _numbers(above: Row, below: Row, found: Comparison) -> str:
    text = f"{above.fd:.3f} / {below.fd:.3f} = {found.ratio:.3f} (95 %: {found.low:.3f} to {found.high:.3f})"
    if found.borrowed:
        text += "; rows of one seed are given the spread of the others"
    return text


def _equal_cost(table: Table, family: str, planned: Planned) -> Verdict:
    """Whether every pruned row costs what the dynamic one of its ratio costs."""
    statement = "static pruning and the dynamic model of a ratio execute the same MACs within 1 %"
    gaps = {
        f"{arm} {ratio:g}{f', {variant}' if variant else ''}": row.gmacs / dynamic.gmacs - 1
        for (of, arm, ratio, variant), row in table.items()
        if of == family
        and arm.startswith("pruned-")
        and (dynamic := table.get((of, "dynamic", ratio, variant)))
    }
    if not gaps:
        return Verdict("equal cost", statement, "not measured", "not measured")
    worst = max(gaps, key=lambda name: abs(gaps[name]))
    rows = [key for key in planned if key[0] == family and _is_plain_pruning(key)]
    missing = to_come([*rows, *((family, "dynamic", key[2], "") for key in rows)], table, planned)
    outcome: Outcome = "held" if abs(gaps[worst]) <= MMACS_TOLERANCE else "missed"
    if outcome == "held" and missing:
        outcome = "not measured"
    text = f"largest difference {gaps[worst]:+.2%} ({worst}), of {len(gaps)} rows"
    return Verdict("equal cost", statement, outcome, text + _rest(missing))


def table_of(rows: Mapping[RowKey, Sequence[Mapping[str, Any]]]) -> dict[RowKey, Row]:
    """Rows out of the results of their cells."""
    table = {}
    for key, cells in rows.items():
        ordered = sorted(cells, key=lambda cell: cell["seed"])

        def mean(name: str, of: Sequence[Mapping[str, Any]] = ordered) -> float | None:
            values = [cell[name] for cell in of if cell.get(name) is not None]
            return fmean(values) if values else None

        table[key] = Row(
            distances=tuple(cell["fd"] for cell in ordered),
            sampling_std=fmean(cell["fd_sampling_std"] for cell in ordered),
            gmacs=fmean(cell["gmacs"] for cell in ordered),
            ratio=mean("ratio"),
            trajectory_ratio=mean("trajectory_ratio"),
            seconds_per_image=mean("seconds_per_image"),
            time_ratio=mean("time_ratio"),
            rate=ordered[0].get("learning_rate"),
            seeds=tuple(cell["seed"] for cell in ordered),
        )
    return table
