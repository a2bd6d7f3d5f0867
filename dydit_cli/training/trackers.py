"""Where metrics go beside ``metrics.jsonl``: TensorBoard and Weights & Biases, for those who have them.

They are conveniences: they are asked for in the recipe, loaded only then, and a run whose tracker fails goes on without it. What
counts is the file of JSON lines, which is always written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dydit_cli.artifacts import write_json
from dydit_cli.errors import DyditError
from dydit_cli.training.reports import StepReport

JSONL = "jsonl"
MEMORY = "trackers.json"
"""In the run folder: what a resumed run must know to go on in the same place."""

NOT_METRICS = {"step"}


class Tracker(Protocol):
    """Somewhere that metrics go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, after a step."""
        ...

    def picture(self, step: int, file: Path) -> None:
        """A grid of samples."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder.

    Args:
        folder: Of the run.
        settings: Of the run, kept as text.
        resumed_from: The step of the checkpoint that it goes on from; what was written beyond it is hidden.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed_from: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_from is None else resumed_from + 1
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if resumed_from is None:
            self._writer.add_text("recipe", f"```\n{json.dumps(dict(settings), indent=2)}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # Whoever looks wants to see it now; a line every few steps costs nothing.
        self._writer.flush()

    def picture(self, step: int, file: Path) -> None:
        """See `Tracker`."""
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; project, entity and mode are those of its own variables (``WANDB_PROJECT``, ``WANDB_MODE``, ...).

    Args:
        folder: Of the run, whose name is the run's; the id is kept there.
        settings: Of the run.
        resumed_from: The step of the checkpoint that it goes on from. Steps that are done again are not sent again: they would
            be the same.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed_from: int | None) -> None:
        import wandb

        known = _memory(folder).get("wandb", {}).get("id") if resumed_from is not None else None
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            id=known,
            resume="allow" if known else None,
            project=os.environ.get("WANDB_PROJECT", "dydit"),
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
        )
        if self._run.id != known:
            write_json(folder / MEMORY, {**_memory(folder), "wandb": {"id": self._run.id}})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, file: Path) -> None:
        """See `Tracker`."""
        self._run.log({"samples": self._wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


MAKERS: dict[str, Callable[[Path, Mapping[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""Trackers by the name that a recipe gives them, which is the name of their package."""


def check_installed(names: Sequence[str]) -> None:
    """See that trackers can be loaded.

    Raises:
        DyditError: If the package of one is missing.
    """
    for name in names:
        if name != JSONL and find_spec(name) is None:
            raise DyditError(
                f"The tracker {name} is not installed.",
                why=f"The recipe asks for it, and Python finds no package {name}.",
                fix=f"Run `pip install {name}`, or leave {name} out of trackers: metrics.jsonl is written anyway.",
            )


class Trackers:
    """All trackers of a run; one that fails is left out from then on.

    Args:
        names: As in the recipe.
        folder: Of the run, which is there.
        settings: Of the run.
        resumed_from: The step of the checkpoint that it goes on from.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], resumed_from: int | None
    ) -> None:
        self._failed: list[str] = []
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            if name != JSONL:
                self._try(name, partial(self._start, name, folder, settings, resumed_from))

    def see(self, report: StepReport, logged: bool) -> tuple[str, ...]:
        """Pass on a step.

        Args:
            report: Of the step.
            logged: Whether its metrics are due.

        Returns:
            What to tell the user: which trackers failed since the last call.
        """
        values = numbers_of(report) if logged else {}
        for name, tracker in list(self._trackers.items()):
            if values:
                self._try(name, partial(tracker.log, report.step, values))
            if report.sample is not None:
                self._try(name, partial(tracker.picture, report.step, report.sample))
        told, self._failed = tuple(self._failed), []
        return told

    def close(self) -> None:
        """Nothing follows."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close)
        self._trackers = {}

    def _start(self, name: str, folder: Path, settings: Mapping[str, Any], resumed_from: int | None) -> None:
        self._trackers[name] = MAKERS[name](folder, settings, resumed_from)

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            # Whatever it is (no network, no login, a full disk at a server): the training is worth more than its curves.
            self._trackers.pop(name, None)
            said = next(iter(str(error).splitlines()), "")
            self._failed.append(
                f"The tracker {name} failed and is left out from now on ({type(error).__name__}: {said[:200]}). "
                "metrics.jsonl goes on."
            )


def numbers_of(report: StepReport) -> dict[str, float]:
    """The numbers of a report by name, without those that this step does not have."""
    return {
        name: float(value)
        for name, value in report.line().items()
        if name not in NOT_METRICS and isinstance(value, int | float)
    }


def _memory(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
