"""The folder of a run: made whole, streamed into while training, finished atomically, and resumed by what
it says of itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import (
    artifact_folder,
    atomic_write,
    read_manifest,
    write_manifest,
    writing,
)
from dydit_cli.artifacts.leftovers import clear_leftovers, temporary_folder
from dydit_cli.artifacts.writing import patiently, refuse_existing
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.recipe.loading import Recipe
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.checkpoint import FOLDER, forget_after
from dydit_cli.training.method import save_result
from dydit_cli.training.reports import StepReport

STAGE = "finetune"
MAY_CHANGE = frozenset(
    {
        # How long and how often: the schedule does not depend on the number of steps, so that a run can be
        # extended.
        *("steps", "log_every", "evaluate_every", "sample_every", "checkpoint_every", "keep_checkpoints"),
        # Where: the same numbers up to rounding.
        *("device", "num_workers", "processes", "sharding", "accumulate", "gradient_checkpointing"),
        # What is done about a file that cannot be read, which the run may have stopped at; and who is told.
        *("on_bad_sample", "trackers"),
        # The way the command was given.
        *("out", "resume", "overwrite"),
    }
)
"""Keys that may differ when a run is resumed; any other would make it a different run."""


@dataclass
class RunFolder:
    """What a run writes.

    Attributes:
        settings: Of this process; where a resumed run changed a key, the new value.
        device: Where it trains, for the manifest.
        recipe_yaml: The resolved recipe, kept beside the weights.
        resumed_from: Step of the checkpoint that the run continues from, or None for a new run.
        begun: Whether this process has written to the folder.
        writes: Whether this process is the one that writes.
    """

    settings: FinetuneSection
    device: torch.device
    recipe_yaml: str
    resumed_from: int | None = None
    begun: bool = False
    writes: bool = True

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.settings.out)

    def begin(self) -> None:
        """Make the folder of a new run, or cut a resumed run's metrics back to its checkpoint.

        Raises:
            DyditError: if the disk refuses; a new run's folder is not there then.
        """
        if not self.writes:
            self.begun = True
            return
        if self.resumed_from is None:
            with artifact_folder(self.path, overwrite=self.settings.overwrite) as temporary:
                self._explain(temporary, {"completed": False})
                (temporary / "metrics.jsonl").touch()
            self.begun = True
            return
        self.begun = True
        forget_after(self.path, self.resumed_from)
        self._cut_metrics(self.resumed_from)
        self._explain(self.path, {"completed": False, "resumed_from": self.resumed_from})

    def log(self, report: StepReport) -> None:
        """Append a line to ``metrics.jsonl``."""
        if not self.writes:
            return
        with writing(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.line()) + "\n")

    def finish(self, model: DynamicModel, results: Mapping[str, Any]) -> None:
        """Put the final weights in place, their configuration last, then the manifest.

        Raises:
            DyditError: if the disk refuses; the checkpoints are untouched then.
        """
        with writing(self.path):
            temporary = temporary_folder(self.path / "final")
            try:
                save_result(model, temporary, self.settings)
                # Whoever finds config.json finds all weights.
                for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                    if file.is_dir():
                        shutil.rmtree(self.path / file.name, ignore_errors=True)
                    patiently(partial(os.replace, file, self.path / file.name))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        self._explain(self.path, {"completed": True, **results})

    def _explain(self, folder: Path, results: Mapping[str, Any]) -> None:
        with atomic_write(folder / "recipe.yaml") as temporary:
            temporary.write_text(self.recipe_yaml, encoding="utf-8")
        write_manifest(
            folder,
            stage=STAGE,
            settings=self.settings.model_dump(mode="json"),
            parent=self.settings.model,
            results=results,
            device=self.device,
        )

    def _cut_metrics(self, step: int) -> None:
        kept = [line for line in _lines(self._metrics) if line["step"] <= step]
        with atomic_write(self._metrics) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"


def _lines(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line that a killed process left half-written is not one."""
    lines = []
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def clear_killed(out: Path) -> list[Path]:
    """Remove what killed processes of this run left half-written: in its folder, among its checkpoints and samples, and beside it."""
    found = clear_leftovers(out.parent, out.name)
    for folder in (out, out / FOLDER, out / "samples"):
        found += clear_leftovers(folder)
    return found


def recipe_text(settings: FinetuneSection, recipe: Recipe | None = None) -> str:
    """The resolved recipe that is kept in the folder, from which the run can be resumed.

    Args:
        settings: The section that runs.
        recipe: The whole recipe that it belongs to, if there is one; its other sections are kept.
    """
    whole = recipe or Recipe(name=STAGE, description="", source=None, sections={}, incomplete={})
    return replace(whole, sections={**whole.sections, STAGE: settings}).to_yaml()


def check_free(settings: FinetuneSection) -> None:
    """See that a new run may be written to ``out``.

    Raises:
        DyditError: if something is there that may not be replaced.
    """
    out, model = Path(settings.out).resolve(), Path(settings.model).resolve()
    if out == model or out in model.parents:
        raise DyditError(
            f"{settings.out} is, or holds, the model that is to be trained.",
            why="Training would replace what it reads.",
            fix="Choose another --out.",
        )
    if out.exists() and not settings.overwrite and (out / "checkpoints").is_dir():
        raise DyditError(
            f"{settings.out} holds a fine-tuning run already.",
            why="Replacing it silently would lose it.",
            fix="Pass --resume to continue it, --overwrite to replace it, or choose another --out.",
        )
    refuse_existing(out, settings.overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise DyditError(
            f"{settings.out} is not an artifact of dydit.",
            why="It has no manifest.json, and --overwrite replaces artifacts only.",
            fix="Choose another --out, or empty that folder yourself.",
        )


def saved_run(settings: FinetuneSection) -> dict[str, Any]:
    """The manifest of the run to resume, after seeing that it is the same run.

    Raises:
        DyditError: if there is no run, or if the recipe changed in a key that matters.
    """
    out = Path(settings.out)
    if not (out / "manifest.json").is_file():
        raise DyditError(
            f"There is no run to resume in {out}.",
            why="It has no manifest.json." if out.exists() else "No such folder exists.",
            fix="Leave --resume out to start the run.",
        )
    manifest = read_manifest(out)
    if manifest.get("stage") != STAGE:
        raise DyditError(
            f"{out} is no fine-tuning run.",
            why=f"Its manifest says that it is the result of '{manifest.get('stage')}'.",
            fix="Pass the --out of a fine-tuning run.",
        )
    before, now = manifest.get("settings", {}), settings.model_dump(mode="json")
    # A run of an earlier version did not know every key; it did what is the default now.
    before = FinetuneSection.model_construct(**before).model_dump(mode="json", warnings=False)
    changed = {key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]}
    if changed:
        listed = ", ".join(f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if key in changed)
        raise DyditError(
            f"The recipe changed since the run in {out} was started: {', '.join(sorted(changed))}.",
            why=f"A resumed run must be the same run; changed: {listed}.",
            fix=f"Resume with `dydit finetune {out / 'recipe.yaml'} --resume`, or start a new run in "
            "another --out.",
        )
    return manifest
