"""What an inspection found, as a record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dydit_cli.artifacts.ancestry import Ancestor

Kind = Literal["checkpoint", "artifact", "pipeline", "adapter", "scores", "results", "unfinished run"]


@dataclass(frozen=True)
class KeyGroup:
    """Keys that differ in numbers alone.

    Attributes:
        pattern: The key, each number written as ``*``.
        count: How many there are.
        why: Why they are in this list.
    """

    pattern: str
    count: int
    why: str = ""


@dataclass(frozen=True)
class Keys:
    """What becomes of the tensors of a file.

    Attributes:
        total: In the file, other copies and other models left out.
        recognised: Used.
        lost: Not used, so that a conversion would not carry them.
        missing: Needed and not there.
    """

    total: int
    recognised: int
    lost: tuple[KeyGroup, ...] = ()
    missing: tuple[KeyGroup, ...] = ()


@dataclass(frozen=True)
class Stored:
    """How the weights lie on disk.

    Attributes:
        container: ``safetensors`` or ``torch``.
        files: Weight files.
        nbytes: Their size.
        copy: Which copy of several was taken, such as ``ema``.
        beside: What else the file holds.
        dtypes: Type of numbers -> how many numbers are of it.
        quantisation: ``fp8`` or ``scaled fp8``, read as bf16; else "".
    """

    container: str
    files: int
    nbytes: int
    copy: str = ""
    beside: tuple[KeyGroup, ...] = ()
    dtypes: dict[str, int] = field(default_factory=dict)
    quantisation: str = ""


@dataclass(frozen=True)
class Routers:
    """The routers of a dynamic model.

    Attributes:
        origin: ``dydit``, or ``authors`` for files of the paper's authors.
        parameters: Of all of them.
        width: ``free`` or ``ordered``.
        always_on: Whether the most important head and group have no row.
        budgets: Least and largest ratio that they serve, where they are told one.
        baked_steps: Sampling steps of the schedule whose widths are written down, of a model without width routers.
    """

    origin: str
    parameters: int
    width: str = "free"
    always_on: bool = True
    budgets: tuple[float, ...] | None = None
    baked_steps: int | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter: a file, or a folder that peft, diffusers or dydit wrote.

    Attributes:
        path: Where.
        kind: ``lora``, ``td-lora``, ...
        names: Whose names its keys have.
        layers: How many layers it changes.
        rank: Its rank; None where layers differ.
        experts: Of TD-LoRA.
        parameters: How many numbers.
        dtypes: Type of numbers -> how many numbers are of it.
    """

    path: str
    kind: str
    names: str
    layers: int
    rank: int | None
    experts: int | None
    parameters: int
    dtypes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What a file or a folder is.

    Attributes:
        path: As given.
        kind: What it is.
        stage: The stage that made it, for artifacts.
        families: Names of the families that it can be read as; several where nothing in it tells them apart.
        layout: ``original`` or ``diffusers`` keys; ``dydit`` for artifacts.
        stored: How the weights lie on disk.
        config: Of the model class.
        geometry: Numbers of the model.
        parameters: ``static``, ``routers`` and ``total``.
        routers: Of a dynamic model.
        keys: What becomes of the tensors.
        adapters: In it, or it itself.
        facts: What its manifest says came of it: ratios, steps, data.
        lineage: Its past, the nearest stage first.
        notes: What else is worth knowing.
        problem: Why it cannot be used as it is: ``what``, ``why``, ``fix``.
        next: A command that goes on from here.
    """

    path: str
    kind: Kind
    stage: str | None = None
    families: tuple[str, ...] = ()
    layout: str | None = None
    stored: Stored | None = None
    config: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    routers: Routers | None = None
    keys: Keys | None = None
    adapters: tuple[Adapter, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    lineage: tuple[Ancestor, ...] = ()
    notes: tuple[str, ...] = ()
    problem: dict[str, str] | None = None
    next: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
