"""The optimiser step: forward, backward, clipping, update, moving average."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from dydit_cli.data import Batch
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.budgets import budget_at
from dydit_cli.training.parts import TrainingParts
from dydit_cli.training.reports import StepReport
from dydit_cli.training.schedule import noise_scale_at, target_at
from dydit_cli.training.step import NoisyBatch, StepLoss, draw, step_loss


class Diverged(Exception):
    """A loss or a gradient that is no number.

    Args:
        what: Which of the two.
        value: What it is instead.
    """

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"{what} is {value}")
        self.what, self.value = what, value


@dataclass(frozen=True)
class Stepped:
    """What a step leaves behind.

    Attributes:
        report: For the console and the metrics.
        noisy: Its batch.
        seconds: It took.
    """

    report: StepReport
    noisy: NoisyBatch
    seconds: float


class Stepper:
    """Makes the steps of a run.

    Args:
        settings: The recipe's section.
        parts: What trains.
    """

    def __init__(self, settings: FinetuneSection, parts: TrainingParts) -> None:
        self._settings = settings
        self._parts = parts

    def step(self, batch: Batch, step: int, offset: float) -> Stepped:
        """One optimiser step and the update of the moving average.

        Args:
            batch: Its samples.
            step: Steps done before.
            offset: Taken off the target of the ratio.

        Raises:
            Diverged: Before the weights are touched.
        """
        started = time.perf_counter()
        settings, parts = self._settings, self._parts
        noisy = self._noised(batch, step)
        loss = self._loss(noisy, step, offset)
        _check_finite(float(loss.total.detach()), "loss")
        parts.optimiser.zero_grad(set_to_none=True)
        parts.accelerator.backward(loss.total)
        norm = self._clip()
        # Under fp16 an overflow is ordinary: the scaler skips the step and lowers its scale.
        if settings.mixed_precision != "fp16":
            _check_finite(norm, "gradient")
        parts.optimiser.step()
        parts.average.update(parts.model, step)
        names = list(loss.terms)
        total, ratio, *terms = torch.stack([loss.total.detach(), loss.ratio, *loss.terms.values()]).tolist()
        seconds = time.perf_counter() - started
        report = StepReport(
            step=step + 1,
            loss=total,
            terms=dict(zip(names, terms, strict=True)),
            trained_ratio=ratio,
            target=self.target(step),
            learning_rate=settings.learning_rate,
            grad_norm=norm,
            images_per_second=settings.batch_size / seconds,
        )
        return Stepped(report, noisy, seconds)

    def target(self, step: int) -> float:
        """The schedule's target of the (0-based) ``step``."""
        settings, budget = self._settings, self._budget(step)
        final = settings.target_ratio if budget is None else budget
        return target_at(step, final, settings.full_width_steps, settings.ramp_steps)

    def reduce_mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over processes."""
        mean: torch.Tensor = self._parts.accelerator.reduce(value, "mean")
        return mean

    def _noised(self, batch: Batch, step: int) -> NoisyBatch:
        settings, parts = self._settings, self._parts
        return draw(
            batch,
            parts.objective,
            parts.model.geometry,
            seed=settings.seed,
            step=step,
            label_dropout=settings.label_dropout,
            device=parts.device,
        )

    def _loss(self, noisy: NoisyBatch, step: int, offset: float) -> StepLoss:
        settings, parts = self._settings, self._parts
        return step_loss(
            parts.denoiser,
            parts.objective,
            parts.model.geometry,
            noisy,
            dynamic=parts.dynamic,
            complete_branch=parts.dynamic
            and step < settings.complete_branch_steps
            and step % settings.complete_branch_every == 0,
            temperature=settings.temperature,
            target=self.target(step) - offset,
            ratio_weight=settings.ratio_weight,
            reduce_mean=self.reduce_mean,
            teacher=parts.teacher,
            budget=self._budget(step),
            noise_scale=noise_scale_at(
                settings.gating, step, settings.full_width_steps, settings.ramp_steps, settings.anneal_steps
            ),
        )

    def _budget(self, step: int) -> float | None:
        settings = self._settings
        return None if settings.budgets is None else budget_at(settings.budgets, settings.seed, step)

    def _clip(self) -> float:
        """Clip the gradients if the recipe says so; return their norm before that."""
        parts = self._parts
        parts.accelerator.unscale_gradients(parts.optimiser)
        parameters = [parameter for parameter in parts.model.parameters() if parameter.grad is not None]
        limit = self._settings.max_grad_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise Diverged(what, value)
