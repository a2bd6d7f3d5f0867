"""A fine-tuning run from its settings to its artifact.

`prepare` checks and opens everything before anything is written; `FineTuning.steps` is a generator of
reports, `FineTuning.finish` measures the result and writes it. Between the two lies nothing but state on
disk: a run that was stopped at any step and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dydit_cli.artifacts import load_for_training
from dydit_cli.artifacts.manifest import device_description, versions
from dydit_cli.data import Batch, DataSplit, TrainingBatches, open_data
from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.flops import executed_ratio, ratio_floor
from dydit_cli.objectives import HeldOutDraws, Objective, RatioReport, measure, objective_of
from dydit_cli.objectives.draws import IMAGES
from dydit_cli.objectives.rectified import RectifiedFlowObjective
from dydit_cli.recipe.loading import Recipe
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import feedback
from dydit_cli.training.accelerator import make_accelerator
from dydit_cli.training.average import MovingAverage
from dydit_cli.training.budgets import budget_at, calibrate_budgets, with_budgets
from dydit_cli.training.calibration import Calibration, calibrate
from dydit_cli.training.checkpoint import Checkpoint, Training, checkpoints, read_checkpoint, write_checkpoint
from dydit_cli.training.optimiser import make_optimiser
from dydit_cli.training.reports import FinetuneResult, StepReport
from dydit_cli.training.run_folder import RunFolder, check_free, recipe_text, saved_run
from dydit_cli.training.schedule import noise_scale_at, target_at
from dydit_cli.training.step import Denoiser, NoisyBatch, StepLoss, batch_ratio, draw, step_loss
from dydit_cli.training.teacher import FrozenTeacher

TIMESTEP_KEYS = ("timestep_location", "timestep_scale", "timestep_shift")
DAMAGES_GUIDANCE = (
    "The model's guidance was distilled from another model, and loss 'denoising' trains it on data alone, which damages it: "
    "leave loss at distillation, unless the data are all that it should know."
)

RECENT_STEPS = 50
"""Over which the ratio of training is averaged in the result."""

Sampler = Callable[[DynamicModel, int, Path], None]
"""Draws a sample grid with the moving average: (model, step, file to write)."""


def prepare(settings: FinetuneSection, *, recipe: Recipe | None = None) -> FineTuning:
    """Check and open everything a run needs; nothing is written yet.

    Args:
        settings: The recipe's section.
        recipe: The whole recipe, to be kept in the artifact; the section alone is kept without it.

    Raises:
        DyditError: for whatever is missing, damaged or does not fit together.
    """
    device = find_device(settings.device)
    manifest = saved_run(settings) if settings.resume else None
    if manifest is None:
        check_free(settings)
    checkpoint = _newest(settings) if manifest is not None else None
    model = load_for_training(settings.model, device)
    if settings.budgets is not None:
        model = with_budgets(model, settings.budgets, settings.target_ratio)
    _check_target(settings, model)
    data = open_data(settings.data, geometry=model.geometry)
    run = FineTuning(settings, model, data, device, recipe_text(settings, recipe))
    if manifest is not None and checkpoint is not None:
        run.continue_from(checkpoint, manifest)
    return run


def fine_tune(
    settings: FinetuneSection, *, recipe: Recipe | None = None, on_sample: Sampler | None = None
) -> FinetuneResult:
    """Run from beginning to end without looking at the reports."""
    run = prepare(settings, recipe=recipe)
    for _ in run.steps(on_sample=on_sample):
        pass
    return run.finish()


class FineTuning:
    """A run that is ready to go; made by `prepare`.

    Attributes:
        settings: The recipe's section.
        model: What trains.
        average: Its moving average, which is what is evaluated and saved.
        data: Training and held-out samples.
        done: Steps done so far.
        interrupted: Whether `steps` ended because it was asked to stop.
        warnings: What looked odd, for the console.
    """

    def __init__(
        self,
        settings: FinetuneSection,
        model: DynamicModel,
        data: DataSplit,
        device: torch.device,
        recipe_yaml: str,
    ) -> None:
        self.settings = settings
        self.model = model
        self.data = data
        self.done = 0
        self.interrupted = False
        self.warnings = list(data.warnings)
        self._device = device
        self._mirror = data.mirror_rule(settings.mirror)
        self._objective = _objective(settings, model)
        loss = _loss_of(settings, model)
        if loss == "denoising" and _is_distilled(model):
            self.warnings.append(DAMAGES_GUIDANCE)
        # A target of 1 is the static control: everything on, routers frozen, all else equal.
        self._dynamic = settings.target_ratio < 1 or settings.budgets is not None
        for parameter in model.router_parameters():
            parameter.requires_grad_(self._dynamic)
        # Before anything is loaded from a checkpoint: a resumed run has the teacher that it was started with.
        self._teacher = FrozenTeacher(model) if loss == "distillation" else None
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.average = MovingAverage(model, settings.ema_decay)
        optimiser = make_optimiser(
            model,
            learning_rate=settings.learning_rate,
            router_learning_rate=settings.router_learning_rate or settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self._accelerator = make_accelerator(device, settings.mixed_precision)
        self._denoiser, self._optimiser = self._accelerator.prepare(Denoiser(model), optimiser)
        self._training = Training(model, self.average, optimiser, self._accelerator.scaler)
        self._folder = RunFolder(settings, device, recipe_yaml)
        self._facts = {"labels_sha256": data.describe()["labels_sha256"]}
        self._saved_results: Mapping[str, Any] | None = None
        self._last_measured: tuple[tuple[int, int], RatioReport] | None = None
        self._seconds = 0.0
        self._trained_here = 0
        # Budgets have no single target that could be moved; what each realises is measured at the end.
        self._controls = self._dynamic and settings.feedback and settings.budgets is None
        self._feedback = feedback.RatioFeedback(settings.ema_decay)
        self._recent_ratios: deque[float] = deque(maxlen=RECENT_STEPS)

    @property
    def complete(self) -> bool:
        """Whether a resumed run has nothing left to do."""
        return self._saved_results is not None

    def continue_from(self, checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> None:
        """Go on where an earlier process of the same run stopped.

        Raises:
            DyditError: if the checkpoint is damaged or the data are no longer the same.
        """
        if checkpoint.facts.get("labels_sha256") != self._facts["labels_sha256"]:
            raise DyditError(
                f"The data in {self.settings.data} changed since the run was started.",
                why="Its training labels differ from those that the checkpoint was trained on.",
                fix="Restore the data, or start a new run in another --out.",
            )
        read_checkpoint(checkpoint, self._training)
        self._feedback.offset = float(checkpoint.facts.get("ratio_offset", 0.0))
        self.done = self._folder.resumed_from = checkpoint.step
        self.warnings += _differences(manifest, self._device)
        results = manifest.get("results", {})
        if results.get("completed") and results.get("steps") == self.settings.steps:
            self._saved_results = results

    def steps(
        self, *, on_sample: Sampler | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[StepReport]:
        """Train, a report a step.

        Args:
            on_sample: Called every ``sample_every`` steps; training itself does not know how to sample.
            should_stop: Asked after each step; true writes a checkpoint and ends the iteration
                (`interrupted`).

        Raises:
            DyditError: if the loss is not finite, a sample cannot be read, or the disk refuses.
        """
        settings = self.settings
        batches = TrainingBatches(self.data.train, settings.batch_size, settings.seed, self._mirror)
        for batch in batches.between(self.done, settings.steps, settings.num_workers):
            report = self._train_on(batch)
            if not self._folder.begun:
                # Only now: a run whose first step fails leaves nothing behind.
                self._folder.begin()
            self.done = report.step
            self.interrupted = should_stop() and self.done < settings.steps
            yield self._after_step(report, on_sample)
            if self.interrupted:
                return

    def finish(self) -> FinetuneResult:
        """Measure the moving average, write it as the final artifact, and say what was reached.

        Raises:
            DyditError: if the disk refuses.
        """
        if self._saved_results is not None:
            names = [field.name for field in fields(FinetuneResult) if field.name != "out"]
            known = {name: self._saved_results[name] for name in names if name in self._saved_results}
            return FinetuneResult(out=Path(self.settings.out), **known)
        calibration = self._calibrated()
        reached = self._measured(IMAGES)
        result = FinetuneResult(
            out=Path(self.settings.out),
            steps=self.done,
            ratio=reached.ratio,
            ratio_standard_error=reached.standard_error,
            target_ratio=self.settings.target_ratio,
            heads=reached.heads,
            groups=reached.groups,
            tokens=reached.tokens,
            held_out_loss=reached.losses["loss"],
            held_out_images=reached.images,
            seconds=self._seconds,
            images_per_second=self._trained_here * self.settings.batch_size / self._seconds
            if self._seconds
            else None,
            trained_ratio=fmean(self._recent_ratios) if self._recent_ratios else None,
            uncalibrated_ratio=calibration.before if calibration is not None else None,
            router_shift=calibration.shift if calibration is not None else 0.0,
        )
        self._folder.finish(self.average.model, {**result.as_dict(), "data": self.data.describe()})
        return result

    def _train_on(self, batch: Batch) -> StepReport:
        """One optimiser step and the update of the moving average."""
        started = time.perf_counter()
        settings, step = self.settings, self.done
        noisy = self._noised(batch, step)
        loss = self._loss(noisy, step)
        self._check_finite(float(loss.total.detach()), "loss", step)
        self._optimiser.zero_grad(set_to_none=True)
        self._accelerator.backward(loss.total)
        norm = self._clip()
        # Under fp16 an overflow is ordinary: the scaler skips the step and lowers its scale.
        if settings.mixed_precision != "fp16":
            self._check_finite(norm, "gradient", step)
        self._optimiser.step()
        self.average.update(self.model, step)
        names = list(loss.terms)
        total, ratio, *terms = torch.stack([loss.total.detach(), loss.ratio, *loss.terms.values()]).tolist()
        seconds = time.perf_counter() - started
        self._seconds += seconds
        self._trained_here += 1
        self._recent_ratios.append(ratio)
        realised = self._followed(noisy, step)
        return StepReport(
            step=step + 1,
            loss=total,
            terms=dict(zip(names, terms, strict=True)),
            trained_ratio=ratio,
            target=self._target(step),
            learning_rate=settings.learning_rate,
            grad_norm=norm,
            images_per_second=settings.batch_size / seconds,
            realised_ratio=realised,
        )

    def _noised(self, batch: Batch, step: int) -> NoisyBatch:
        settings = self.settings
        return draw(
            batch,
            self._objective,
            self.model.geometry,
            seed=settings.seed,
            step=step,
            label_dropout=settings.label_dropout,
            device=self._device,
        )

    def _followed(self, noisy: NoisyBatch, step: int) -> float | None:
        """Look at the realised ratio where it is due, and let the control see it once the target has come down."""
        target = self._target(step)
        controls = self._controls and _due(step + 1, feedback.EVERY) and target == self.settings.target_ratio
        if not (controls or _due(step + 1, self.settings.log_every)):
            return None
        realised = self._realised(noisy)
        if controls:
            self._feedback.see(realised, target)
        return realised

    @torch.no_grad()
    def _realised(self, noisy: NoisyBatch) -> float:
        """The moving average's ratio on a batch, with thresholds: what training's own masks are to become."""
        model = self.average.model
        _, routing = model.denoise(noisy.noisy, noisy.t, noisy.condition)
        weights = self._objective.for_shape(noisy.clean.shape[1:]).ratio_weights(noisy.t)
        return float(batch_ratio(executed_ratio(routing, model.geometry), weights, self._reduce_mean))

    def _reduce_mean(self, value: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = self._accelerator.reduce(value, "mean")
        return mean

    def _loss(self, noisy: NoisyBatch, step: int) -> StepLoss:
        settings = self.settings
        return step_loss(
            self._denoiser,
            self._objective,
            self.model.geometry,
            noisy,
            dynamic=self._dynamic,
            complete_branch=self._dynamic
            and step < settings.complete_branch_steps
            and step % settings.complete_branch_every == 0,
            temperature=settings.temperature,
            target=self._target(step) - self._feedback.offset,
            ratio_weight=settings.ratio_weight,
            reduce_mean=self._reduce_mean,
            teacher=self._teacher,
            budget=self._budget(step),
            noise_scale=noise_scale_at(
                settings.gating, step, settings.full_width_steps, settings.ramp_steps, settings.anneal_steps
            ),
        )

    def _target(self, step: int) -> float:
        settings, budget = self.settings, self._budget(step)
        final = settings.target_ratio if budget is None else budget
        return target_at(step, final, settings.full_width_steps, settings.ramp_steps)

    def _budget(self, step: int) -> float | None:
        settings = self.settings
        return None if settings.budgets is None else budget_at(settings.budgets, settings.seed, step)

    def _clip(self) -> float:
        """Clip the gradients if the recipe says so; return their norm before that."""
        self._accelerator.unscale_gradients(self._optimiser)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        limit = self.settings.max_grad_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def _check_finite(self, value: float, what: str, step: int) -> None:
        if math.isfinite(value):
            return
        ours = self._folder.begun or self._folder.resumed_from is not None
        kept = checkpoints(self._folder.path) if ours else []
        fallback = f"the last good checkpoint is {kept[-1].path}" if kept else "there is no checkpoint yet"
        raise DyditError(
            f"The {what} became {value} at step {step + 1}.",
            why="Training diverged, or a sample holds extreme values; the weights of that step were not "
            "used.",
            fix=f"Lower the learning rates or set max_grad_norm; {fallback}.",
        )

    def _after_step(self, report: StepReport, on_sample: Sampler | None) -> StepReport:
        """Whatever is due after a step: evaluation, metrics, checkpoint, samples; in this order, so that
        the metrics on disk reach at least as far as the newest checkpoint.
        """
        settings, step = self.settings, report.step
        if _due(step, settings.evaluate_every):
            measured = self._measured(settings.evaluate_images)
            report = replace(report, ema_ratio=measured.ratio, ema_loss=measured.losses["loss"])
        if _due(step, settings.log_every):
            self._folder.log(report)
        if _due(step, settings.checkpoint_every) or step == settings.steps or self.interrupted:
            facts = {**self._facts, "ratio_offset": self._feedback.offset}
            path = write_checkpoint(
                self._folder.path, step, self._training, keep=settings.keep_checkpoints, facts=facts
            )
            report = replace(report, checkpoint=path)
        if on_sample is not None and _due(step, settings.sample_every):
            grid = self._folder.path / "samples" / f"step_{step:07d}.png"
            grid.parent.mkdir(exist_ok=True)
            on_sample(self.average.model, step, grid)
            report = replace(report, sample=grid)
        return report

    def _calibrated(self) -> Calibration | None:
        """Correct the moving average's routers, once the target has come down; checkpoints stay as they are, so that a run which
        goes on later does so from what it has learned.
        """
        settings, model = self.settings, self.average.model
        ramped = self.done >= settings.full_width_steps + settings.ramp_steps
        if not (self._dynamic and settings.calibrate and ramped):
            return None
        self._last_measured = None
        if settings.budgets is not None and isinstance(model, DynamicTransformer):
            calibrate_budgets(model, self.data.train, self._objective)
            return None
        return calibrate(model, self.data.train, self._objective, settings.target_ratio)

    def _measured(self, images: int) -> RatioReport:
        """The moving average's ratio and loss now; measured once a step, as the last step's may be asked
        for twice.
        """
        key = (self.done, images)
        if self._last_measured is None or self._last_measured[0] != key:
            draws = HeldOutDraws(self.data.held_out, self._objective, images)
            self._last_measured = (key, measure(self.average.model, draws))
        return self._last_measured[1]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _objective(settings: FinetuneSection, model: DynamicModel) -> Objective:
    """The objective of the model's family with the recipe's distribution of timesteps.

    Raises:
        DyditError: if such a distribution is given for a family that has none.
    """
    objective = objective_of(model)
    if isinstance(objective, RectifiedFlowObjective):
        return replace(
            objective,
            location=settings.timestep_location,
            scale=settings.timestep_scale,
            shift_draws=settings.timestep_shift,
        )
    given = [
        key for key in TIMESTEP_KEYS if getattr(settings, key) != FinetuneSection.model_fields[key].default
    ]
    if given:
        raise DyditError(
            f"{', '.join(given)} cannot be set for a {family_of(model).title}.",
            why="Its timesteps are drawn evenly; only rectified flow (FLUX) prefers some of them.",
            fix="Leave it out.",
        )
    return objective


def _is_distilled(model: DynamicModel) -> bool:
    return bool(model.config.get("guidance_embeds", False))


def _loss_of(settings: FinetuneSection, model: DynamicModel) -> str:
    if settings.loss != "auto":
        return settings.loss
    return "distillation" if family_of(model).objective == "rectified-flow" else "denoising"


def _newest(settings: FinetuneSection) -> Checkpoint:
    out = Path(settings.out)
    found = checkpoints(out)
    if not found:
        raise DyditError(
            f"The run in {out} has no checkpoint to resume from.",
            why="It ended before its first checkpoint was written.",
            fix="Start it again with --overwrite instead of --resume.",
        )
    if found[-1].step > settings.steps:
        raise DyditError(
            f"The run in {out} has done {found[-1].step} steps already; {settings.steps} are asked for.",
            why="A resumed run can be extended, not shortened.",
            fix=f"Set steps to {found[-1].step} or more.",
        )
    return found[-1]


def _check_target(settings: FinetuneSection, model: DynamicModel) -> None:
    floor = ratio_floor(model.geometry)
    least = min((settings.target_ratio, *(settings.budgets or ())))
    if least < floor:
        raise DyditError(
            f"A target ratio of {least:g} cannot be reached; the floor of this model is {floor:.4f}.",
            why="One head and one channel group of every block are always on, whatever the routers decide.",
            fix=f"Set target_ratio to {math.ceil(floor * 100) / 100:.2f} or more.",
        )


def _differences(manifest: Mapping[str, Any], device: torch.device) -> list[str]:
    """Why a resumed run may not be bit for bit the run that was started."""
    before: dict[str, Any] = {
        **manifest.get("versions", {}),
        "device": manifest.get("device"),
        "threads": manifest.get("threads"),
    }
    now: dict[str, Any] = {
        **versions(),
        "device": device_description(device),
        "threads": torch.get_num_threads(),
    }
    changed = [
        f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name) not in (None, now[name])
    ]
    if not changed:
        return []
    return [f"Resumed elsewhere than it was started, so not bit for bit the same run: {', '.join(changed)}."]
