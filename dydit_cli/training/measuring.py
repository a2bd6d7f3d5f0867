"""What the moving average has reached: its ratio and loss while a run goes on, and the corrections that follow from them."""

from __future__ import annotations

from dataclasses import replace

import torch

from dydit_cli.data import DataSplit
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import HeldOutDraws, RatioReport, measure
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import feedback
from dydit_cli.training.budgets import calibrate_budgets
from dydit_cli.training.calibration import Calibration, calibrate
from dydit_cli.training.parts import TrainingParts
from dydit_cli.training.step import NoisyBatch, mean_ratio
from dydit_cli.training.stepping import Stepper
from dydit_cli.training.targets import TimeCost


class Measuring:
    """Measures the moving average of a run.

    Args:
        settings: The recipe's section.
        parts: Of the run.
        stepper: Knows the schedule.
        data: Training and held-out samples.

    Attributes:
        feedback: The control of the ratio.
    """

    def __init__(
        self, settings: FinetuneSection, parts: TrainingParts, stepper: Stepper, data: DataSplit
    ) -> None:
        self._settings = settings
        self._parts = parts
        self._stepper = stepper
        self._data = data
        self._last: tuple[tuple[int, int], RatioReport] | None = None
        # Budgets have no single target that could be moved; what each realises is measured at the end.
        self._controls = parts.dynamic and settings.feedback and settings.budgets is None
        self.feedback = feedback.RatioFeedback(settings.ema_decay)

    def follow(self, noisy: NoisyBatch, step: int) -> float | None:
        """Look at the realised ratio where it is due, and let the control see it once the target has come down."""
        target = self._stepper.target(step)
        controls = self._controls and due(step + 1, feedback.EVERY) and target == self._settings.target_ratio
        logged = due(step + 1, self._settings.log_every) or step + 1 == self._settings.steps
        if not (controls or logged):
            return None
        realised = self._realised(noisy, self._stepper.budget(step))
        if controls:
            self.feedback.see(realised, target)
        return realised

    @torch.no_grad()
    def _realised(self, noisy: NoisyBatch, budget: float | None) -> float:
        """The moving average's ratio on a batch, with thresholds: what training's own masks are to become."""
        average = self._parts.average
        if budget is not None:
            average.model.set_budget(budget)
        ratios = []
        for part in noisy.parts(self._settings.accumulate):
            _, routing = average.denoise(part.noisy, part.t, part.condition)
            ratios.append(mean_ratio(routing, average.model.geometry, part, self._parts.cost))
        if budget is not None:
            average.model.set_budget(self._settings.target_ratio)
        return float(self._stepper.reduce_mean(torch.stack(ratios).mean()))

    def _measure(self, model: DynamicModel, draws: HeldOutDraws) -> RatioReport:
        """`measure` of the moving average, shared by the processes."""
        parts = self._parts
        cost = parts.cost if isinstance(parts.cost, TimeCost) else None
        return measure(
            model, draws, device=parts.device, denoise=parts.average.denoise, world=parts.world, cost=cost
        )

    def _towards_target(self, model: DynamicModel, draws: HeldOutDraws) -> RatioReport:
        """The same with what the target refers to as the ratio."""
        report = self._measure(model, draws)
        return replace(report, ratio=report.targeted)

    def calibrated(self, done: int) -> Calibration | None:
        """Correct the moving average's routers, once the target has come down; checkpoints stay as they are, so that a run which
        goes on later does so from what it has learned.
        """
        settings, model = self._settings, self._parts.average.model
        ramped = done + self._stepper.ahead >= settings.full_width_steps + settings.ramp_steps
        if not (self._parts.dynamic and settings.calibrate and ramped):
            return None
        self._last = None
        if settings.budgets is not None and isinstance(model, DynamicTransformer):
            calibrate_budgets(model, self._data.train, self._parts.measured, self._towards_target)
            return None
        return calibrate(
            model, self._data.train, self._parts.measured, settings.target_ratio, self._towards_target
        )

    def held_out(self, done: int, images: int) -> RatioReport:
        """The moving average's ratio and loss after ``done`` steps; measured once, as the last step's may be asked for twice."""
        key = (done, images)
        if self._last is None or self._last[0] != key:
            draws = HeldOutDraws(self._data.held_out, self._parts.measured, images)
            self._last = (key, self._measure(self._parts.average.model, draws))
        return self._last[1]


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 means never."""
    return every > 0 and step % every == 0
