"""What is tried where a hypothesis is missed or undecided (docs/protocol.md, "A miss and what follows"). Nothing here runs anything.

Each remedy is the row itself with one thing changed, as a cell of its own on the validation split with the seed of the choices, beside
the row as it is under the same seed. What any arm would profit from (more steps, another learning rate, other weights in the loss) is
compared with what the row is compared with, treated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from scripts.reproduction.cells import CHOICE_SEED, CONTROL, DYNAMIC, PRUNED, Cell, Family
from scripts.reproduction.verdicts import MMACS_TOLERANCE

UNCHANGED = "as-it-is"
"""Variant of the row itself on the validation split."""
LEAST_REMEDIES = 3
"""That the protocol asks for before a row is given up."""
REMEDIED = "remedied"
CAPACITY = "a base of more capacity (12 blocks of 384 channels)"
"""The remedy that is no cell here, because it needs a GPU."""

PRUNED_TWIN = "pruned-taylor"
"""The pruning that a remedy is given to as well where any arm would profit from it: the best of the three in every row of the core."""

WEIGHT_RATES: Mapping[str, float] = {DYNAMIC: 3e-4, CONTROL: 3e-4, PRUNED_TWIN: 3e-4, "td-lora": 1e-3}
"""The learning rates of the recipes, of what is not a router."""
ROUTER_RATES: Mapping[Family, float] = {"dit": 1e-3, "sit": 2e-2}
"""The routers' learning rates of the recipes."""
GROUPS = 8
"""Channel groups of the base models: as many as heads."""


Changes = Callable[[Family, str, float], tuple[str, ...]]
"""Overrides by family, arm and λ."""


@dataclass(frozen=True)
class Remedy:
    """One thing that is changed.

    Attributes:
        name: Short; a variant of cells.
        title: For the page.
        changes: What is set otherwise.
        longer: How many times as many steps.
        shared: Whether what the row is compared with is treated alike.
        families: Those that have such a thing.
        short: For pictures, where the title is too long for them.
    """

    name: str
    title: str
    changes: Changes = lambda family, arm, ratio: ()
    longer: int = 1
    shared: bool = False
    families: tuple[Family, ...] = ("dit", "sit")
    short: str = ""


def _rate(factor: float) -> Changes:
    return lambda family, arm, ratio: (f"finetune.learning_rate={WEIGHT_RATES[arm] * factor:.3g}",)


def _router_rate(factor: float) -> Changes:
    return lambda family, arm, ratio: (f"finetune.router_learning_rate={ROUTER_RATES[family] * factor:.3g}",)


def _always(*changes: str) -> Changes:
    return lambda family, arm, ratio: changes


def _calibrated(family: Family, arm: str, ratio: float) -> tuple[str, ...]:
    """A start as docs/calibrate.md recommends it: its own ranking, and no noise of routing after the ramp."""
    start = ("convert.calibrate={data}", f"convert.calibrate_ratio={ratio:g}")
    ranking = ("convert.importance=taylor", "convert.data={data}")
    return (*start, *ranking, "finetune.gating=annealed", "finetune.anneal_steps=0")


REMEDIES = (
    Remedy("twice-steps", "twice the steps", longer=2, shared=True),
    Remedy("four-times-steps", "four times the steps", longer=4, shared=True),
    Remedy("router-rate-third", "routers' learning rate a third", _router_rate(1 / 3)),
    Remedy("router-rate-triple", "routers' learning rate three times", _router_rate(3)),
    Remedy("annealed", "gating annealed", _always("finetune.gating=annealed")),
    Remedy("ordered", "width ordered", _always("convert.width=ordered")),
    Remedy("half-groups", "half the channel groups", _always(f"convert.num_groups={GROUPS // 2}")),
    Remedy("twice-groups", "twice the channel groups", _always(f"convert.num_groups={GROUPS * 2}")),
    Remedy("contiguous", "grouping contiguous", _always("convert.grouping=contiguous")),
    Remedy(
        "taylor",
        "Taylor ranking",
        _always("convert.importance=taylor", "convert.data={data}"),
        short="Taylor",
    ),
    Remedy("distillation", "distillation from the complete model", _always("finetune.loss=distillation")),
    Remedy("calibrated", "calibrated start", _calibrated),
    Remedy("rate-third", "learning rate of all but routers a third", _rate(1 / 3), shared=True),
    Remedy(
        "min-snr-5",
        "noise levels weighted, γ = 5",
        _always("finetune.snr_gamma=5"),
        shared=True,
        families=("dit",),
        short="γ = 5",
    ),
    Remedy(
        "min-snr-1",
        "noise levels weighted, γ = 1",
        _always("finetune.snr_gamma=1"),
        shared=True,
        families=("dit",),
        short="γ = 1",
    ),
    Remedy(
        "min-snr-0.1",
        "noise levels weighted, γ = 0.1",
        _always("finetune.snr_gamma=0.1"),
        shared=True,
        families=("dit",),
        short="γ = 0.1",
    ),
)
"""In the order of the protocol."""


@dataclass(frozen=True)
class Subject:
    """A row that remedies are for.

    Attributes:
        family, arm, ratio: The row's.
        against: Arm and λ that its hypothesis compares it with.
        hypotheses: Names that call for it, the family's in front where it is not the DiT.
    """

    family: Family
    arm: str
    ratio: float
    against: tuple[str, float]
    hypotheses: tuple[str, ...]

    @property
    def row(self) -> tuple[str, str, float, str]:
        """As in the tables."""
        return self.family, self.arm, self.ratio, ""


SUBJECTS = (
    Subject("dit", DYNAMIC, 0.5, (CONTROL, 1.0), ("H1", "H2")),
    Subject("dit", DYNAMIC, 0.3, (CONTROL, 1.0), ("H3",)),
    Subject("dit", "td-lora", 0.5, (DYNAMIC, 0.5), ("H4",)),
    Subject("sit", DYNAMIC, 0.5, (CONTROL, 1.0), ("sit-H1", "sit-H2")),
)
HYPOTHESES = tuple(name for subject in SUBJECTS for name in subject.hypotheses)


def variant_title(variant: str, *, short: bool = False) -> str:
    """A variant of a row as tables name it: that of a remedy by the remedy's title.

    Args:
        variant: Of a cell or a row.
        short: As pictures name it.
    """
    titles = {
        f"{REMEDIED}-{remedy.name}": (remedy.short if short else "") or remedy.title for remedy in REMEDIES
    }
    return titles.get(variant, variant)


def cells_for(subject: Subject) -> list[Cell]:
    """What is tried for a row: first itself and what it is compared with, then remedies, those that any arm would profit from with that."""
    found = [validation_cell(subject), partner(subject)]
    for remedy in remedies_for(subject):
        found.append(validation_cell(subject, remedy))
        if remedy.shared:
            found.append(partner(subject, remedy))
    return found


def remedies_for(subject: Subject) -> list[Remedy]:
    """Those that the row's family has."""
    return [remedy for remedy in REMEDIES if subject.family in remedy.families]


def all_remedies() -> list[Cell]:
    """Those of every row, each once: rows share what they are compared with."""
    return list(dict.fromkeys(cell for subject in SUBJECTS for cell in cells_for(subject)))


def validation_cell(subject: Subject, remedy: Remedy | None = None) -> Cell:
    """The row on the validation split, with a remedy or as it is."""
    return _cell(subject.family, subject.arm, subject.ratio, remedy)


def partner(subject: Subject, remedy: Remedy | None = None) -> Cell:
    """What the row is compared with, on the validation split: with a remedy that both share, else as it is."""
    arm, ratio = subject.against
    return _cell(subject.family, arm, ratio, remedy if remedy is not None and remedy.shared else None)


def _cell(family: Family, arm: str, ratio: float, remedy: Remedy | None) -> Cell:
    if remedy is None:
        return Cell(family, arm, ratio, CHOICE_SEED, "remedy", None, UNCHANGED)
    changes = remedy.changes(family, arm, ratio)
    return Cell(family, arm, ratio, CHOICE_SEED, "remedy", None, remedy.name, changes, remedy.longer)


def called_for(
    verdicts: Mapping[str, Sequence[Mapping[str, Any]]], unfinished: Set[tuple[Any, ...]]
) -> list[Subject]:
    """The rows whose hypotheses were missed or left undecided.

    Args:
        verdicts: By family, as results hold them.
        unfinished: Rows of which cells of the core have not run; what rests on them is no verdict yet.
    """
    missed = {
        each["name"] if family == "dit" else f"{family}-{each['name']}"
        for family, found in verdicts.items()
        for each in found
        if each["outcome"] in ("missed", "undecided")
    }
    return [
        subject
        for subject in SUBJECTS
        if any(name in missed and not unfinished & needed(subject, name) for name in subject.hypotheses)
    ]


def needed(subject: Subject, hypothesis: str) -> set[tuple[Any, ...]]:
    """The rows that a verdict rests on."""
    if hypothesis.endswith("H2"):
        return {subject.row, *((subject.family, arm, subject.ratio, "") for arm in PRUNED)}
    return {subject.row, (subject.family, *subject.against, "")}


def subjects_named(names: Iterable[str]) -> list[Subject]:
    """The rows of hypotheses such as ``H1`` or ``sit-H1``."""
    wanted = set(names)
    return [subject for subject in SUBJECTS if wanted & set(subject.hypotheses)]


def winner(subject: Subject, found: Mapping[Cell, Mapping[str, Any]]) -> Remedy | None:
    """The remedy with the least validation distance, if that is less than the row's own at the same MACs within 1 %.

    Args:
        subject: The row.
        found: Results of the cells that have run.
    """
    own = found.get(validation_cell(subject))
    if own is None:
        return None
    tried = {
        remedy: found[cell]
        for remedy in remedies_for(subject)
        if (cell := validation_cell(subject, remedy)) in found
    }
    rivals = {
        remedy: result["fd"]
        for remedy, result in tried.items()
        if result["fd"] < own["fd"] and result["gmacs"] <= (1 + MMACS_TOLERANCE) * own["gmacs"]
    }
    return min(rivals, key=lambda remedy: rivals[remedy]) if rivals else None


def remedied_cells(subject: Subject, remedy: Remedy) -> list[Cell]:
    """A remedy that won, against the test reference with the first seed; one that is shared beside its twins."""
    chosen = [validation_cell(subject, remedy)]
    if remedy.shared:
        chosen.append(partner(subject, remedy))
        if subject.arm == DYNAMIC:
            chosen.append(_cell(subject.family, PRUNED_TWIN, subject.ratio, remedy))
    return [replace(cell, seed=0, group="remedied", variant=f"{REMEDIED}-{cell.variant}") for cell in chosen]
