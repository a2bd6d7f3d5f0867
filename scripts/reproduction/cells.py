"""The cells of the protocol: one trained and measured model each, and what identifies it.

A cell is a recipe of `recipes/baselines/` with a few changes. Nothing here runs anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PROTOCOL = 1
"""Part of every key: raised where a change makes earlier cells incomparable."""

Family = Literal["dit", "sit"]
Group = Literal["choice", "core", "extended", "remedy", "remedied"]
VALIDATED: tuple[Group, ...] = ("choice", "remedy")
"""Groups that are measured on the validation split; the others are measured against the test reference."""

DYNAMIC, CONTROL, BASE = "dynamic", "static-control", "base"
PRUNED = ("pruned-random", "pruned-magnitude", "pruned-taylor")
RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates that each kind of arm chooses from, on the validation split."""
ADAPTER_RATES = (3e-4, 1e-3, 3e-3)
"""Those of adapters, which are used to larger ones."""
SEEDS = (0, 1, 2)
CHOICE_SEED = 100
"""Of choices and remedies: no cell that is reported shares a draw with them."""
STEPS = 1500
"""Of the recipes."""

FAMILIES: Mapping[Family, str] = {"dit": "DiT", "sit": "SiT"}
"""As they are called on pages."""
SAMPLERS: Mapping[Family, str] = {"dit": "ddim", "sit": "euler"}
ROUTERS: Mapping[Family, tuple[str, ...]] = {
    "dit": (),
    # A SiT's timestep embedding is a seventh of a DiT's in size, and a velocity's loss several times a noise's.
    "sit": ("finetune.router_learning_rate=2e-2", "finetune.ratio_weight=5"),
}


@dataclass(frozen=True)
class Cell:
    """One model of the tables.

    Attributes:
        family: ``dit`` or ``sit``.
        arm: Name of a recipe in ``recipes/baselines``, or ``base``: the model that all start from, not trained further.
        ratio: λ.
        seed: Of training and sampling.
        group: ``choice`` and ``remedy`` (measured on the validation split), ``core``, ``extended``, or ``remedied``: a remedy that
            won there, against the test reference.
        rate: Learning rate; None for the one that was chosen.
        variant: What else distinguishes it, for its name.
        changes: Overrides of its recipe that belong to the variant; ``{data}`` stands for the data.
        longer: How many times as many steps it trains.
    """

    family: Family
    arm: str
    ratio: float
    seed: int
    group: Group = "core"
    rate: float | None = None
    variant: str = ""
    changes: tuple[str, ...] = ()
    longer: int = 1

    @property
    def name(self) -> str:
        """For people and folders: ``dit-dynamic-0.5-seed0``."""
        parts = [self.family, self.arm, f"{self.ratio:g}", self.variant]
        parts.append(f"seed{self.seed}")
        if self.group == "choice":
            parts.append(f"rate{self.rate:g}")
        return "-".join(part for part in parts if part)

    @property
    def row(self) -> tuple[str, str, float, str]:
        """What seeds share: a row of a table."""
        return self.family, self.arm, self.ratio, self.variant

    @property
    def is_validated(self) -> bool:
        """Whether it is measured on the validation split, and never against the test reference."""
        return self.group in VALIDATED

    @property
    def is_static(self) -> bool:
        """Whether it has no routers that decide."""
        return self.arm in (CONTROL, BASE, *PRUNED)

    @property
    def kind(self) -> str:
        """Which choice of a learning rate it follows: all rankings are cut alike, so that one of them chooses for all."""
        if self.arm in PRUNED:
            return "pruned-magnitude"
        return CONTROL if self.arm == CONTROL else self.arm if "lora" in self.arm else DYNAMIC


@dataclass(frozen=True)
class Sizes:
    """How much a run of the protocol does.

    Attributes:
        steps: Of training; None as the recipes say.
        images: Samples of a distance.
        sampler_steps: Of the sampler.
        schedule: Overrides of the recipes' schedules, for fewer steps.
    """

    steps: int | None = None
    images: int = 5000
    sampler_steps: int = 25
    schedule: tuple[str, ...] = ()


FULL = Sizes()
QUICK = Sizes(
    steps=120,
    images=400,
    sampler_steps=10,
    schedule=(
        "finetune.full_width_steps=5",
        "finetune.ramp_steps=40",
        "finetune.ema_decay=0.95",
        "finetune.router_learning_rate=4e-3",
    ),
)


def core() -> Iterator[Cell]:
    """The cells that the hypotheses need: what the headline states first, and a dynamic model before what is pruned to its MACs.

    The other dynamic rows stand between a dynamic model and its prunings, so that a second process has something to do meanwhile.
    """
    yield Cell("dit", DYNAMIC, 0.5, 0)
    yield Cell("dit", CONTROL, 1.0, 0)
    yield Cell("dit", DYNAMIC, 0.3, 0)
    yield Cell("dit", "td-lora", 0.5, 0)
    for arm in PRUNED:
        yield Cell("dit", arm, 0.5, 0)
    for seed in SEEDS[1:]:
        for arm in (DYNAMIC, CONTROL, *PRUNED):
            yield Cell("dit", arm, 1.0 if arm == CONTROL else 0.5, seed)
    yield Cell("sit", DYNAMIC, 0.5, 0)
    yield Cell("sit", CONTROL, 1.0, 0)
    yield Cell("dit", DYNAMIC, 0.7, 0)
    rows: tuple[tuple[Family, float], ...] = (("sit", 0.5), ("dit", 0.3), ("dit", 0.7))
    for family, ratio in rows:
        for arm in PRUNED:
            yield Cell(family, arm, ratio, 0)
    yield Cell("dit", BASE, 1.0, 0)
    for arm in ("lora", "ordered", "budgets"):
        yield Cell("dit", arm, 0.5, 0)


def extended() -> Iterator[Cell]:
    """What makes the tables complete, where there is time."""
    for arm in ("random-routers", "width-only", "tokens-only"):
        yield Cell("dit", arm, 0.5, 0, "extended")
    yield Cell("dit", DYNAMIC, 0.5, 0, "extended", None, "fp32", ("finetune.mixed_precision=no",))
    yield Cell("dit", DYNAMIC, 0.5, 0, "extended", None, "annealed", ("finetune.gating=annealed",))
    yield Cell("sit", BASE, 1.0, 0, "extended")
    for ratio in (0.9, 0.6, 0.4):
        yield Cell("dit", DYNAMIC, ratio, 0, "extended")
    for ratio in (0.7, 0.3):
        yield Cell("sit", DYNAMIC, ratio, 0, "extended")


def choices() -> Iterator[Cell]:
    """What the learning rates are chosen by; the adapters choose from larger ones."""
    for family in ("dit", "sit"):
        for arm in (DYNAMIC, CONTROL, "pruned-magnitude"):
            for rate in RATES:
                yield Cell(family, arm, 1.0 if arm == CONTROL else 0.5, CHOICE_SEED, "choice", rate)
    for arm in ("lora", "td-lora"):
        for rate in ADAPTER_RATES:
            yield Cell("dit", arm, 0.5, CHOICE_SEED, "choice", rate)


def all_cells() -> list[Cell]:
    """Every cell of the protocol but the remedies, in the order in which they run."""
    return [*choices(), *core(), *extended()]


def quick_cells() -> list[Cell]:
    """A few, with one seed and the recipes' learning rate."""
    arms = ((DYNAMIC, 0.5), (CONTROL, 1.0), ("pruned-magnitude", 0.5), ("pruned-random", 0.5))
    return [Cell("dit", arm, ratio, 0, "core", 3e-4) for arm, ratio in arms]


@dataclass(frozen=True)
class Circumstances:
    """What all cells of a run share, and what its results depend on.

    Attributes:
        bases: Family -> checkpoint that all arms start from.
        data: As given to ``data`` of a recipe.
        sizes: How much is done.
        hashes: Of base checkpoints, data, feature network and reference.
    """

    bases: Mapping[str, str]
    data: str
    sizes: Sizes
    hashes: Mapping[str, str] = field(default_factory=dict)


def overrides(cell: Cell, around: Circumstances, rate: float | None, prune: float | None) -> list[str]:
    """``section.key=value`` for the cell's recipe, without the folders.

    Args:
        cell: Which.
        around: What all cells share.
        rate: The learning rate; None for the recipe's.
        prune: Share of attention and MLP that a pruned model keeps.
    """
    sizes = around.sizes
    found = [f"convert.checkpoint={around.bases[cell.family]}", f"convert.family={cell.family}"]
    if prune is not None:
        found.append(f"convert.prune={prune:.4f}")
    if cell.arm == "pruned-taylor":
        found.append(f"convert.data={around.data}")
    if cell.arm == "pruned-random":
        found.append(f"convert.seed={cell.seed}")
    found += [f"finetune.data={around.data}", f"finetune.seed={cell.seed}"]
    if sizes.steps is not None or cell.longer > 1:
        found.append(f"finetune.steps={(sizes.steps or STEPS) * cell.longer}")
    if rate is not None:
        found.append(f"finetune.learning_rate={rate:g}")
    if not cell.is_static:
        found.append(f"finetune.target_ratio={cell.ratio:g}")
        if cell.arm != "random-routers":
            found += [*ROUTERS[cell.family], *sizes.schedule]
    elif sizes.schedule:
        found.append("finetune.ema_decay=0.95")
    found += [change.replace("{data}", around.data) for change in cell.changes]
    found += [
        f"evaluate.sampler={SAMPLERS[cell.family]}",
        f"evaluate.num_images={sizes.images}",
        f"evaluate.steps={sizes.sampler_steps}",
        f"evaluate.seed={cell.seed}",
        "evaluate.batch_size=100",
    ]
    if cell.is_static:
        found.append("evaluate.execution=static")
    return found


def key_of(
    cell: Cell, around: Circumstances, changed: list[str], recipe: Mapping[str, Any], version: str
) -> str:
    """What a cell's result depends on, as a hash: equal keys mean that nothing has to be done again.

    Args:
        cell: Which.
        around: What all cells share.
        changed: Its `overrides`.
        recipe: The resolved recipe without folders.
        version: Of dydit.

    A base model of another family is no part of it: each family's cells can run as soon as their own base is finished.
    """
    content = {
        "protocol": PROTOCOL,
        "version": version,
        "cell": [cell.name, cell.group],
        "changed": changed,
        "recipe": recipe,
        "hashes": {name: value for name, value in around.hashes.items() if name not in _other_bases(cell)},
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _other_bases(cell: Cell) -> set[str]:
    """Names, among the hashes, of the base models that the cell does not start from."""
    return {f"base_{family}" for family in SAMPLERS if family != cell.family}
