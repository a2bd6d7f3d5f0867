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

    def after(self, report: StepReport, on_sample: Sampler | None, *, last: bool) -> StepReport:
        """Whatever is due after a step: evaluation, metrics, checkpoint, samples; in this order, so that
        the metrics on disk reach at least as far as the newest checkpoint.

        Args:
            report: Of the step.
            on_sample: Draws a grid.
            last: Whether no step of this process follows.
        """
        settings, step = self._settings, report.step
        if due(step, settings.evaluate_every):
            measured = self._measuring.held_out(step, settings.evaluate_images)
            report = replace(report, ema_ratio=measured.ratio, ema_loss=measured.losses["loss"])
        if due(step, settings.log_every):
            self._folder.log(report)
        if due(step, settings.checkpoint_every) or last:
            report = replace(report, checkpoint=self._checkpoint(step))
        if on_sample is not None and due(step, settings.sample_every):
            grid = self._folder.path / "samples" / f"step_{step:07d}.png"
            grid.parent.mkdir(exist_ok=True)
            on_sample(self._training.average.model, step, grid)
            report = replace(report, sample=grid)
        return report

    def _checkpoint(self, step: int) -> Path:
        facts = {**self._facts, "ratio_offset": self._measuring.feedback.offset}
        return write_checkpoint(
            self._folder.path, step, self._training, keep=self._settings.keep_checkpoints, facts=facts
        )
