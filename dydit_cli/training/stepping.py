"""The optimiser step: forward, backward, clipping, update, moving average; for a batch in parts and in several processes.

The ratio's loss is the square of a mean over the global batch, so that the gradient of one part needs the ratio of all. Other
processes are asked for theirs after the forward. The parts of an accumulated batch come one after the other: their masks are drawn
ahead in a pass without gradients, with the same noise and therefore the same outcome, and the gradient is exact [ours]. That costs
one forward a part, which training without a ratio (the static control, or a weight of 0) is spared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dydit_cli.data import Batch
from dydit_cli.dynamic.gates import GumbelGating
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.budgets import budget_at
from dydit_cli.training.parts import TrainingParts
from dydit_cli.training.reports import StepReport
from dydit_cli.training.schedule import noise_scale_at, steps_ahead, target_at
from dydit_cli.training.sharding import whole
from dydit_cli.training.starting import start_of
from dydit_cli.training.step import NoisyBatch, StepLoss, draw, mean_ratio, step_loss


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

    Attributes:
        ahead: Steps of the schedule that a calibrated model need not make.
    """

    def __init__(self, settings: FinetuneSection, parts: TrainingParts) -> None:
        self._settings = settings
        self._parts = parts
        self.ahead = steps_ahead(
            start_of(settings.model), settings.target_ratio, settings.full_width_steps, settings.ramp_steps
        )

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
        noisy = self.noised(batch, step)
        cut = noisy.parts(settings.accumulate)
        global_ratio = self._ratio_ahead(cut, step) if len(cut) > 1 else self.reduce_mean
        parts.optimiser.zero_grad(set_to_none=True)
        losses = []
        for number, part in enumerate(cut, start=1):
            with self._gathering(last=number == len(cut)):
                loss = self._loss(part, step, offset, global_ratio)
                parts.accelerator.backward(loss.total / len(cut))
            losses.append(loss)
        told = self._mean_of(losses)
        _check_finite(told["loss"], "loss")
        norm = self._clip()
        # Under fp16 an overflow is ordinary: the scaler skips the step and lowers its scale.
        if settings.mixed_precision != "fp16":
            _check_finite(norm, "gradient")
        parts.optimiser.step()
        parts.average.update(parts.model, step)
        seconds = time.perf_counter() - started
        report = StepReport(
            step=step + 1,
            loss=told.pop("loss"),
            trained_ratio=told.pop("ratio"),
            terms=told,
            target=self.target(step),
            learning_rate=settings.learning_rate,
            grad_norm=norm,
            images_per_second=settings.batch_size / seconds,
        )
        return Stepped(report, noisy, seconds)

    def target(self, step: int) -> float:
        """The schedule's target of the (0-based) ``step``."""
        settings, budget = self._settings, self.budget(step)
        final = settings.target_ratio if budget is None else budget
        return target_at(step + self.ahead, final, settings.full_width_steps, settings.ramp_steps)

    def short_of_target(self) -> str | None:
        """What to tell a user whose run ends before its target has come down; None where that is not so."""
        settings = self._settings
        # Frozen routers, of a static control or of random decisions, follow no target.
        if not any(parameter.requires_grad for parameter in self._parts.model.router_parameters()):
            return None
        least = min((settings.target_ratio, *(settings.budgets or ())))
        lengths = settings.full_width_steps, settings.ramp_steps
        needed = sum(lengths) - self.ahead
        if settings.steps > needed:
            return None
        last = target_at(settings.steps - 1 + self.ahead, least, *lengths)
        return (
            f"The schedule takes the whole run: at the last of its {settings.steps:,} steps the target is {last:.4f}, "
            f"and no step trains at {least:g}. Shorten full_width_steps ({lengths[0]:,}) and ramp_steps ({lengths[1]:,}), "
            f"or train more than {needed:,} steps."
        )

    def reduce_mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self._parts.world.mean(value)

    def _gathering(self, last: bool) -> AbstractContextManager[None]:
        """Let gradients pile up here until those of the last part go to the other processes with them.

        Shards are handed round after every part instead: whole gradients would not fit.
        """
        parts = self._parts
        if last or not isinstance(parts.denoiser, DistributedDataParallel):
            return nullcontext()
        held: AbstractContextManager[None] = parts.denoiser.no_sync()
        return held

    def _ratio_ahead(self, cut: Sequence[NoisyBatch], step: int) -> Callable[[Tensor], Tensor]:
        """The mean ratio of the global batch, before any of its parts is trained on; see the module."""
        settings, parts = self._settings, self._parts
        if not parts.dynamic or settings.ratio_weight == 0:
            return self.reduce_mean
        with torch.no_grad():
            ratios = []
            for part in cut:
                gating = GumbelGating(part.routing_noise, *self._sampling(step))
                ((_, routing),) = parts.denoiser(part.noisy, part.t, part.condition, [("dense", gating)])
                ratios.append(mean_ratio(routing, parts.model.geometry, part, parts.cost))
            known = self.reduce_mean(torch.stack(ratios).mean())
        return lambda local: known

    def _mean_of(self, losses: Sequence[StepLoss]) -> dict[str, float]:
        """Loss, ratio and terms over all parts and processes."""
        names = ["loss", "ratio", *losses[0].terms]
        rows = [torch.stack([loss.total.detach(), loss.ratio, *loss.terms.values()]) for loss in losses]
        means = self.reduce_mean(torch.stack(rows).mean(dim=0))
        return dict(zip(names, means.tolist(), strict=True))

    def _sampling(self, step: int) -> tuple[float, float, float | None]:
        """Temperature, scale of the noise, and budget of a step."""
        settings = self._settings
        scale = noise_scale_at(
            settings.gating,
            step + self.ahead,
            settings.full_width_steps,
            settings.ramp_steps,
            settings.anneal_steps,
        )
        return settings.temperature, scale, self.budget(step)

    def noised(self, batch: Batch, step: int) -> NoisyBatch:
        """A batch with all that is drawn for the (0-based) ``step``."""
        settings, parts = self._settings, self._parts
        return draw(
            batch,
            parts.objective,
            parts.model.geometry,
            seed=settings.seed,
            step=step,
            label_dropout=settings.label_dropout,
            device=parts.device,
            reduce_mean=self.reduce_mean,
        )

    def _loss(
        self, noisy: NoisyBatch, step: int, offset: float, global_ratio: Callable[[Tensor], Tensor]
    ) -> StepLoss:
        settings, parts = self._settings, self._parts
        temperature, noise_scale, budget = self._sampling(step)
        return step_loss(
            parts.denoiser,
            parts.objective,
            parts.model.geometry,
            noisy,
            dynamic=parts.dynamic,
            complete_branch=parts.dynamic
            and step < settings.complete_branch_steps
            and step % settings.complete_branch_every == 0,
            temperature=temperature,
            target=self.target(step) - offset,
            ratio_weight=settings.ratio_weight,
            reduce_mean=global_ratio,
            teacher=parts.teacher,
            budget=budget,
            noise_scale=noise_scale,
            cost=parts.cost,
        )

    def budget(self, step: int) -> float | None:
        """What the (0-based) ``step`` trains for and tells the routers, of a run with budgets."""
        settings = self._settings
        return None if settings.budgets is None else budget_at(settings.budgets, settings.seed, step)

    def _clip(self) -> float:
        """Clip the gradients if the recipe says so; return their norm before that."""
        parts = self._parts
        parts.accelerator.unscale_gradients(parts.optimiser)
        parameters = [parameter for parameter in parts.model.parameters() if parameter.grad is not None]
        limit = self._settings.max_grad_norm or float("inf")
        return float(whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise Diverged(what, value)
