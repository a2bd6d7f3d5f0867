"""What is written while a run goes on: metrics, checkpoints, pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.checkpoint import Training, write_checkpoint
from dydit_cli.training.measuring import Measuring, due
from dydit_cli.training.reports import StepReport
from dydit_cli.training.run_folder import RunFolder
from dydit_cli.training.sharding import whole_model
from dydit_cli.training.trackers import Trackers

Sampler = Callable[[DynamicModel, int, Path], None]
"""Draws a sample grid with the moving average: (model, step, file to write)."""


class Bookkeeping:
    """Writes what is due after a step.

    Args:
        settings: The recipe's section.
        folder: Of the run.
        training: What a checkpoint holds.
        measuring: Evaluates.
        facts: Noted in every checkpoint.
    """

    def __init__(
        self,
        settings: FinetuneSection,
        folder: RunFolder,
        training: Training,
        measuring: Measuring,
        facts: Mapping[str, Any],
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._training = training
        self._measuring = measuring
        self._facts = facts
        self._trackers: Trackers | None = None

    def after(self, report: StepReport, on_sample: Sampler | None, *, last: bool) -> StepReport:
        """Whatever is due after a step: evaluation, metrics, samples, checkpoint; in this order, so that
        what is on disk reaches at least as far as the newest checkpoint, from which a killed run goes on.

        Args:
            report: Of the step.
            on_sample: Draws a grid.
            last: Whether no step of this process follows.
        """
        settings, step = self._settings, report.step
        if due(step, settings.evaluate_every):
            measured = self._measuring.held_out(step, settings.evaluate_images)
            report = replace(report, ema_ratio=measured.targeted, ema_loss=measured.losses["loss"])
        # The end of a run is told whatever the cadence; the end of a process is not, or a resumed run would tell more.
        logged = due(step, settings.log_every) or step == settings.steps
        if logged:
            self._folder.log(report)
        if on_sample is not None and due(step, settings.sample_every):
            grid = self._folder.path / "samples" / f"step_{step:07d}.png"
            model = whole_model(self._training.average.model, self._training.world)
            if model is not None and self._folder.writes:
                grid.parent.mkdir(exist_ok=True)
                on_sample(model, step, grid)
            report = replace(report, sample=grid)
        if self._folder.writes:
            report = replace(report, notes=(*report.notes, *self._track(report, logged, last)))
        if due(step, settings.checkpoint_every) or last:
            report = replace(report, checkpoint=self.checkpoint(step))
        return report

    def _track(self, report: StepReport, logged: bool, last: bool) -> tuple[str, ...]:
        """Pass a step on to the trackers; return what to tell the user of them."""
        if self._trackers is None:
            folder, settings = self._folder, self._settings
            # Not before the folder of the run is there, in which they write.
            self._trackers = Trackers(
                settings.trackers, folder.path, settings.model_dump(mode="json"), folder.resumed_from
            )
        told = self._trackers.see(report, logged)
        if last:
            self._trackers.close()
        return told

    def checkpoint(self, step: int) -> Path:
        """Write the checkpoint of a step."""
        facts = {**self._facts, "ratio_offset": self._measuring.feedback.offset}
        return write_checkpoint(
            self._folder.path, step, self._training, keep=self._settings.keep_checkpoints, facts=facts
        )
