"""The hypotheses, and how a table decides about them. Nothing here reads a file.

Distances are compared as ratios of means over seeds. The 95 % interval of a ratio comes from the spread over seeds (Student's t on
the logarithm); a row with one seed is given the relative spread of the rows that have several, which is said in its verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom (a table of statistics)."""

MMACS_TOLERANCE = 0.01
"""Within which MACs count as equal."""

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
        outcome: ``held`` if the whole interval fulfils it, ``missed`` if none of it does, else ``undecided``.
        text: The numbers.
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


def pooled_spread(table: Table) -> float | None:
    """Relative standard deviation over seeds, root mean square over the rows that have several."""
    found = [row.fd_std / row.fd for row in table.values() if len(row.distances) > 1]
    return math.sqrt(fmean(value**2 for value in found)) if found else None


def compare(above: Row, below: Row, spread: float | None) -> Comparison:
    """The ratio of two mean distances.

    Args:
        above: The numerator.
        below: The denominator.
        spread: Relative standard deviation for rows of one seed; their sampling's if None.
    """
    variance, freedom, borrowed = 0.0, 0, False
    for row in (above, below):
        count = len(row.distances)
        relative = row.fd_std / row.fd
        if count == 1 and spread is not None:
            relative, borrowed = max(relative, spread), True
        variance += relative**2 / count
        freedom += max(1, count - 1)
    nearest = max(known for known in T_95 if known <= freedom)
    ratio, half = above.fd / below.fd, T_95[nearest] * math.sqrt(variance)
    return Comparison(ratio, ratio * math.exp(-half), ratio * math.exp(half), borrowed)


def best_pruning(table: Table, family: str, ratio: float) -> tuple[str, Row] | None:
    """The pruning with the least distance: chosen after the fact, in favour of the baseline."""
    found = [
        (key[1], row)
        for key, row in table.items()
        if key[0] == family and key[1].startswith("pruned-") and key[2] == ratio
    ]
    return min(found, key=lambda item: item[1].fd) if found else None


def at_most(
    name: str, statement: str, above: Row | None, below: Row | None, limit: float, spread: float | None
) -> Verdict:
    """The verdict on "the distance of ``above`` is at most ``limit`` times that of ``below``"."""
    if above is None or below is None:
        return Verdict(name, statement, "not measured", "not measured")
    found = compare(above, below, spread)
    outcome: Outcome = "held" if found.high <= limit else "missed" if found.low > limit else "undecided"
    return Verdict(
        name, statement, outcome, _numbers(above, below, found), (found.ratio, found.low, found.high)
    )


def at_least(
    name: str, statement: str, above: Row | None, below: Row | None, limit: float, spread: float | None
) -> Verdict:
    """The verdict on "the distance of ``above`` is at least ``limit`` times that of ``below``"."""
    if above is None or below is None:
        return Verdict(name, statement, "not measured", "not measured")
    found = compare(above, below, spread)
    outcome: Outcome = "held" if found.low >= limit else "missed" if found.high < limit else "undecided"
    return Verdict(
        name, statement, outcome, _numbers(above, below, found), (found.ratio, found.low, found.high)
    )


def _numbers(above: Row, below: Row, found: Comparison) -> str:
    text = f"{above.fd:.3f} / {below.fd:.3f} = {found.ratio:.3f} (95 %: {found.low:.3f} to {found.high:.3f})"
    if found.borrowed:
        text += "; rows of one seed are given the spread of the others"
    return text


def verdicts(table: Table, family: str = "dit") -> list[Verdict]:
    """All verdicts of the protocol."""
    control = table.get((family, "static-control", 1.0, ""))
    dynamic = table.get((family, "dynamic", 0.5, ""))
    pruned = best_pruning(table, family, 0.5)
    td_lora = table.get((family, "td-lora", 0.5, ""))
    spread = pooled_spread(table)
    found = [
        at_most(
            "H1",
            "λ = 0.5 is within 10 % of the static control's Fréchet distance",
            dynamic,
            control,
            1.10,
            spread,
        ),
        at_least(
            "H2",
            "the best static pruning at the MACs of λ = 0.5 has at least 1.5 times its distance",
            pruned[1] if pruned else None,
            dynamic,
            1.5,
            spread,
        ),
        at_most(
            "H3",
            "λ = 0.3 is within 40 % of the static control's distance",
            table.get((family, "dynamic", 0.3, "")),
            control,
            1.40,
            spread,
        ),
        at_most(
            "H4", "TD-LoRA at λ = 0.5 is within 10 % of full fine-tuning", td_lora, dynamic, 1.10, spread
        ),
    ]
    found.append(_equal_cost(table, family))
    return found


def _equal_cost(table: Table, family: str) -> Verdict:
    """Whether every pruned row costs what the dynamic one of its ratio costs."""
    statement = "static pruning and the dynamic model of a ratio execute the same MACs within 1 %"
    gaps = {
        f"{arm} {ratio:g}": row.gmacs / dynamic.gmacs - 1
        for (of, arm, ratio, variant), row in table.items()
        if of == family
        and arm.startswith("pruned-")
        and (dynamic := table.get((of, "dynamic", ratio, variant)))
    }
    if not gaps:
        return Verdict("equal cost", statement, "not measured", "not measured")
    worst = max(gaps, key=lambda name: abs(gaps[name]))
    outcome: Outcome = "held" if abs(gaps[worst]) <= MMACS_TOLERANCE else "missed"
    return Verdict("equal cost", statement, outcome, f"largest difference {gaps[worst]:+.2%} ({worst})")


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
