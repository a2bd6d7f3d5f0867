"""A fine-tuning run from its settings to its artifact.

`prepare` checks and opens everything before anything is written; `FineTuning.steps` is a generator of
reports, `FineTuning.finish` measures the result and writes it. Between the two lies nothing but state on
disk: a run that was stopped at any step and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dydit_cli.artifacts import load_for_training
from dydit_cli.data import Batch, DataSplit, TrainingBatches, open_data
from dydit_cli.data.bad_samples import BadSample, BadSamples, readable_part
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import objective_of
from dydit_cli.objectives.draws import IMAGES
from dydit_cli.processes.world import ALONE, World, join
from dydit_cli.recipe.loading import Recipe
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training.bookkeeping import Bookkeeping, Sampler
from dydit_cli.training.budgets import with_budgets
from dydit_cli.training.checkpoint import Checkpoint, Training, checkpoints
from dydit_cli.training.deciding import Beginning, deciding_named, least_ratio
from dydit_cli.training.measuring import Measuring
from dydit_cli.training.method import base_facts, check_base
from dydit_cli.training.parts import assemble
from dydit_cli.training.reports import FinetuneResult, StepReport
from dydit_cli.training.resuming import differences, restore, resumable
from dydit_cli.training.run_folder import RunFolder, check_free, clear_killed, recipe_text, saved_run
from dydit_cli.training.sharding import whole_model
from dydit_cli.training.step import NoisyBatch
from dydit_cli.training.stepping import Diverged, Stepper
from dydit_cli.training.trackers import check_installed

RECENT_STEPS = 50
"""Over which the ratio of training is averaged in the result."""


def prepare(
    settings: FinetuneSection, *, recipe: Recipe | None = None, world: World | None = None
) -> FineTuning:
    """Check and open everything a run needs; nothing is written yet, but what a killed process left half-written goes.

    Args:
        settings: The recipe's section.
        recipe: The whole recipe, to be kept in the artifact; the section alone is kept without it.
        world: The processes that train together; if not given, they meet now, as many as ``settings`` asks for.

    Raises:
        DyditError: for whatever is missing, damaged or does not fit together.
    """
    world = join(settings.processes, settings.device) if world is None else world
    device = world.device(settings.device)
    check_installed(settings.trackers)
    left = clear_killed(Path(settings.out)) if world.is_first else []
    manifest = saved_run(settings) if settings.resume else None
    if manifest is None:
        check_free(settings)
    candidates = resumable(settings, manifest) if manifest is not None else []
    # What is to be sharded goes to the device block by block.
    sharded = settings.sharding == "fsdp2" and world.joined
    model = load_for_training(settings.model, torch.device("cpu") if sharded else device)
    if settings.budgets is not None:
        model = with_budgets(model, settings.budgets, settings.target_ratio)
    _check_target(settings, model)
    data = open_data(settings.data, geometry=model.geometry)
    bad: tuple[BadSample, ...] = ()
    if settings.on_bad_sample == "skip":
        held_out, bad = readable_part(data.held_out)
        data = replace(data, held_out=held_out)
    if settings.target_ratio < 1 or settings.budgets is not None:
        begin = deciding_named(settings.routers).begin
        begin(Beginning(model, data.train, objective_of(model), settings.target_ratio, settings.seed))
    run = FineTuning(settings, model, data, device, recipe_text(settings, recipe), world)
    run.warnings += run.pass_over(bad)
    if left:
        run.warnings.append(
            f"A killed process had left {len(left)} file(s) or folder(s) half-written; it was cleared up: "
            f"{', '.join(path.name for path in left)}."
        )
    if manifest is not None:
        run.continue_from(candidates, manifest)
    run.warnings += run.foreseen()
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
        world: The processes that train together; the first of them writes.
        warnings: What looked odd, for the console.
    """

    def __init__(
        self,
        settings: FinetuneSection,
        model: DynamicModel,
        data: DataSplit,
        device: torch.device,
        recipe_yaml: str,
        world: World = ALONE,
    ) -> None:
        self.settings = settings
        self.world = world
        self.data = data
        self.done = 0
        self.interrupted = False
        self._mirror = data.mirror_rule(settings.mirror)
        parts = assemble(settings, model, device, world)
        self.model, self.average = parts.model, parts.average
        self.warnings = [*data.warnings, *parts.warnings]
        self._device = device
        self._stepper = Stepper(settings, parts)
        self._measuring = Measuring(settings, parts, self._stepper, data)
        self._training = Training(
            parts.model, parts.average, parts.optimiser, parts.accelerator.scaler, world
        )
        self._folder = RunFolder(settings, device, recipe_yaml, writes=world.is_first)
        self._bad = BadSamples(len(data.train) + len(data.held_out))
        # Noted in every checkpoint, as they are then.
        self._facts = {
            "labels_sha256": data.describe()["labels_sha256"],
            "bad_samples": self._bad.found,
            **base_facts(settings),
        }
        self._bookkeeping = Bookkeeping(settings, self._folder, self._training, self._measuring, self._facts)
        self._saved_results: Mapping[str, Any] | None = None
        self._seconds = 0.0
        self._trained_here = 0
        self._recent_ratios: deque[float] = deque(maxlen=RECENT_STEPS)

    @property
    def complete(self) -> bool:
        """Whether a resumed run has nothing left to do."""
        return self._saved_results is not None

    def continue_from(self, candidates: Sequence[Checkpoint], manifest: Mapping[str, Any]) -> None:
        """Go on where an earlier process of the same run stopped.

        Args:
            candidates: Its checkpoints, the newest first. Without any it had not come far, and begins again.
            manifest: Of its folder.

        Raises:
            DyditError: if all checkpoints are damaged or the data are no longer the same.
        """
        if not candidates:
            self._folder.resumed_from = 0
            self.warnings.append(
                f"The run in {self.settings.out} ended before its first checkpoint; it begins again."
            )
            return
        checkpoint, told = restore(candidates, self._training)
        self.warnings += told
        check_base(checkpoint.facts, self._facts, self.settings)
        if checkpoint.facts.get("labels_sha256") != self._facts["labels_sha256"]:
            raise DyditError(
                f"The data in {self.settings.data} changed since the run was started.",
                why="Its training labels differ from those that the checkpoint was trained on.",
                fix="Restore the data, or start a new run in another --out.",
            )
        self._measuring.feedback.offset = float(checkpoint.facts.get("ratio_offset", 0.0))
        self._bad.found.update(checkpoint.facts.get("bad_samples", {}))
        self.done = self._folder.resumed_from = checkpoint.step
        self.warnings += differences(manifest, self._device, self.settings)
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
        if self.complete:
            return
        for batch in self._batches():
            told = self.pass_over([sample for bad in self.world.gather(batch.bad) for sample in bad])
            report = replace(self._train_on(batch), bad_samples=len(self._bad.found), notes=told)
            if not self._folder.begun:
                # Only now: a run whose first step fails leaves nothing behind.
                self._folder.begin()
            self.done = report.step
            # Signals reach processes at different steps; they stop at the same one.
            self.interrupted = self.world.any(should_stop()) and self.done < settings.steps
            last = self.interrupted or self.done == settings.steps
            yield self._bookkeeping.after(report, on_sample, last=last)
            if self.interrupted:
                return

    def foreseen(self) -> list[str]:
        """What can be told of the end before the first step; nothing of a run that is complete."""
        told = None if self.complete else self._stepper.short_of_target()
        return [] if told is None else [told]

    def next_batch(self) -> tuple[Batch, NoisyBatch]:
        """What the next step would train on; nothing is trained."""
        batch = self._stream().at(self.done)
        return batch, self._stepper.noised(batch, self.done)

    def finish(self) -> FinetuneResult:
        """Measure the moving average, write it as the final artifact, and say what was reached.

        Raises:
            DyditError: if the disk refuses.
        """
        if self._saved_results is not None:
            names = [field.name for field in fields(FinetuneResult) if field.name != "out"]
            known = {name: self._saved_results[name] for name in names if name in self._saved_results}
            return FinetuneResult(out=Path(self.settings.out), **known)
        calibration = self._measuring.calibrated(self.done)
        reached = self._measuring.held_out(self.done, IMAGES)
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
            time_ratio=reached.cost,
        )
        described = {**self.data.describe(), "bad_samples": self._bad.found}
        model = whole_model(self.average.model, self.world)
        if model is not None and self.world.is_first:
            self._folder.finish(model, {**result.as_dict(), "data": described})
        return result

    def pass_over(self, bad: Sequence[BadSample]) -> tuple[str, ...]:
        """Count samples that could not be read; return what to tell the user of them.

        Raises:
            DyditError: If there are too many.
        """
        try:
            return self._bad.see(bad)
        except DyditError as error:
            raise self._stranded(error) from error

    def _batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left."""
        settings = self.settings
        try:
            yield from self._stream().between(self.done, settings.steps, settings.num_workers)
        except DyditError as error:
            raise self._stranded(error) from error

    def _stream(self) -> TrainingBatches:
        settings = self.settings
        return TrainingBatches(
            self.data.train,
            settings.batch_size,
            settings.seed,
            self._mirror,
            skip_bad=settings.on_bad_sample == "skip",
            rank=self.world.rank,
            processes=self.world.size,
        )

    def _stranded(self, error: DyditError) -> DyditError:
        """An error of the data, after what was trained until now was put into a checkpoint."""
        # A checkpoint takes all processes, and the others know nothing of the error.
        if not self._folder.begun or self.world.size > 1:
            return error
        kept = checkpoints(self._folder.path)
        if not kept or kept[-1].step < self.done:
            self._bookkeeping.checkpoint(self.done)
        recipe = self._folder.path / "recipe.yaml"
        return DyditError(
            error.what,
            why=error.why,
            fix=f"{error.fix} The {self.done} steps until now are kept: go on with `dydit finetune {recipe} --resume`.",
        )

    def _train_on(self, batch: Batch) -> StepReport:
        """One step, and a look at the realised ratio where that is due."""
        step = self.done
        try:
            stepped = self._stepper.step(batch, step, self._measuring.feedback.offset)
        except Diverged as error:
            raise self._diverged(error, step) from error
        self._seconds += stepped.seconds
        self._trained_here += 1
        self._recent_ratios.append(stepped.report.trained_ratio)
        return replace(stepped.report, realised_ratio=self._measuring.follow(stepped.noisy, step))

    def _diverged(self, error: Diverged, step: int) -> DyditError:
        ours = self._folder.begun or self._folder.resumed_from is not None
        kept = checkpoints(self._folder.path) if ours else []
        fallback = f"the last good checkpoint is {kept[-1].path}" if kept else "there is no checkpoint yet"
        return DyditError(
            f"The {error.what} became {error.value} at step {step + 1}.",
            why="Training diverged, or a sample holds extreme values; the weights of that step were not "
            "used.",
            fix=f"Lower the learning rates or set max_grad_norm; {fallback}.",
        )


def _check_target(settings: FinetuneSection, model: DynamicModel) -> None:
    if model.geometry.is_pruned and (settings.target_ratio < 1 or settings.budgets is not None):
        raise DyditError(
            "A pruned model has no routers that could be trained.",
            why="It is static: what was cut out is gone, and what is left always runs.",
            fix="Set target_ratio to 1, or convert the checkpoint without --prune.",
        )
    if settings.target == "latency":
        return  # The table knows its own floor.
    floor = least_ratio(deciding_named(settings.routers), model.geometry)
    least = min((settings.target_ratio, *(settings.budgets or ())))
    if least < floor:
        raise DyditError(
            f"A target ratio of {least:g} cannot be reached; the floor of this model is {floor:.4f}.",
            why="One head and one channel group of every block are always on, whatever the routers decide.",
            fix=f"Set target_ratio to {math.ceil(floor * 100) / 100:.2f} or more.",
        )
