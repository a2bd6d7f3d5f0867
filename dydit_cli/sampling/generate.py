"""Generate images with a dynamic model, a batch at a time: 50,000 images need no more memory than one batch.

Image i has the class ``classes[i % len(classes)]`` and its own noise, so it is the same in any batch and on any number of
processes, up to the rounding of a matrix product, which depends on the batch's size; ``deterministic`` removes that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import require
from dydit_cli.families.registry import family_of
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.processes.world import ALONE, World
from dydit_cli.sampling.determinism import deterministic_kernels
from dydit_cli.sampling.guidance import GUIDED_CHOICES, Guidance, GuidedField
from dydit_cli.sampling.noise import ImageNoise
from dydit_cli.sampling.rectified import Schedule
from dydit_cli.sampling.samplers import Sampler, check_steps, sampler_for

Progress = Callable[[float], None]

CLASS_GUIDANCE = 1.5
"""Of models with classes, where nothing else is asked for: the papers' scale for their distances."""


@dataclass(frozen=True)
class Batch:
    """Finished images.

    Attributes:
        indices: Global indices of the images.
        labels: Their classes.
        samples: (B, C, h, w) fp32 on the model's device: pixels in about [-1, 1], or latents at the model's scale.
        ratios: (B,) executed share of attention and MLP MACs on each image's own way, over all evaluations and branches.
        evaluations: Calls of the model that each image took.
    """

    indices: tuple[int, ...]
    labels: tuple[int, ...]
    samples: Tensor
    ratios: Tensor
    evaluations: int


@dataclass(frozen=True)
class GenerationSettings:
    """What to generate, checked against the model; see `check_settings`."""

    sampler: Sampler
    classes: tuple[int, ...]
    num_images: int
    steps: int
    guidance: Guidance
    seed: int
    batch_size: int
    deterministic: bool

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return -(-self.num_images // self._batch_images)

    def batches(self) -> Iterator[tuple[int, ...]]:
        """The indices of each batch."""
        size = self._batch_images
        for first in range(0, self.num_images, size):
            yield tuple(range(first, min(first + size, self.num_images)))

    @property
    def _batch_images(self) -> int:
        """Images of a batch.

        An adaptive sampler makes one image at a time, or its steps would depend on the others. A deterministic run does too:
        padding to a fixed batch would not do, because the number of kept tokens, and with it the shape of a product, would
        still depend on the others.
        """
        return 1 if self.sampler.adaptive or self.deterministic else self.batch_size

    def label(self, index: int) -> int:
        """The class of image ``index``."""
        return self.classes[index % len(self.classes)]

    def labels_of_run(self, null: int) -> list[int] | None:
        """All labels that the model will be asked for, ``null`` among them under guidance.

        None for a deterministic run: what is computed for all labels at once depends, in its last bits, on how many they are.
        """
        if self.deterministic:
            return None
        classes = set(self.classes[: self.num_images])
        return sorted(classes | {null} if self.guidance.branches > 1 else classes)


def check_settings(
    objective: str,
    num_classes: int,
    *,
    classes: Sequence[int] | None = None,
    num_images: int = 8,
    steps: int = 50,
    guidance: float | None = None,
    guidance_channels: str = "original",
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    deterministic: bool = False,
) -> GenerationSettings:
    """Check what a user asks for against what the model can do, before any work. The arguments are those of `generate`.

    Args:
        objective: ``diffusion``, ``flow`` or ``rectified-flow``.
        num_classes: Classes of the model without the null class; of a model of texts 0.

    Raises:
        DyditError: For what cannot be.
    """
    chosen = sampler_for(objective, sampler)
    check_steps(chosen, steps)
    guidance = CLASS_GUIDANCE if guidance is None else guidance
    if not num_classes:
        # No class is left out in an unconditional model, so that there is nothing to guide away from.
        _refuse_classes(classes)
        classes, num_classes, guidance = (0,), 1, 1.0
    labels = tuple(range(num_classes)) if classes is None else tuple(int(label) for label in classes)
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong or not labels:
        raise DyditError(
            f"The model has no class {', '.join(map(str, wrong))}." if wrong else "No class is given.",
            why=f"It was trained on {num_classes} classes, 0 to {num_classes - 1}.",
            fix="Pass such numbers with --classes, or leave it out for all classes in turn.",
        )
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise DyditError(
                f"{name} is {value}.",
                why="It must be at least 1.",
                fix=f"Pass --{name.replace('_', '-')} 8, say.",
            )
    if not 0 <= guidance < float("inf"):
        raise DyditError(
            f"A guidance of {guidance} is not possible.",
            why="It is a finite number: 0 ignores the class, 1 is the plain model, more exaggerates the class.",
            fix="Pass --guidance 1.5 (best FID in the papers) or 4 (pictures).",
        )
    if guidance_channels not in GUIDED_CHOICES:
        raise DyditError(
            f"'{guidance_channels}' is not a choice of guided channels.",
            why="Guidance acts on the noise channels that the family's original guides ('original'), on the first three ('first3') "
            "or on all of them ('all').",
            fix="Pass guidance_channels=original, first3 or all.",
        )
    return GenerationSettings(
        chosen,
        labels,
        num_images,
        steps,
        Guidance(guidance, guidance_channels),
        seed,
        batch_size,
        deterministic,
    )


def _refuse_classes(classes: Sequence[int] | None) -> None:
    if set(classes or (0,)) != {0}:
        raise DyditError(
            "The model has no classes.",
            why="It was trained without labels.",
            fix="Leave out --classes.",
        )


def generate(
    model: DynamicModel,
    *,
    classes: Sequence[int] | None = None,
    num_images: int = 8,
    steps: int = 50,
    guidance: float | None = None,
    guidance_channels: str = "original",
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    deterministic: bool = False,
    conditions: TextCondition | None = None,
    size: tuple[int, int] | None = None,
    schedule: Schedule | None = None,
    on_progress: Progress | None = None,
    world: World = ALONE,
) -> Iterator[Batch]:
    """Generate images in the model's own execution, dtype and device. Arguments are checked at once, work is done on iteration.

    Args:
        model: From `dydit_cli.load_model`.
        classes: Labels, used in turn; None is all of them in turn.
        num_images: Images.
        steps: Steps of the sampler (intervals, for an ODE).
        guidance: Classifier-free guidance; 1 runs one branch, 1.5 is the default. That of FLUX is part of its conditions.
        guidance_channels: ``original``, ``first3`` or ``all``.
        sampler: A name in `dydit_cli.sampling.samplers.SAMPLERS`; None is the family's default.
        seed: Image i depends on (seed, i) alone.
        batch_size: Images in one forward (twice as many rows under guidance).
        deterministic: Make each image alone and with deterministic kernels: the same picture bit for bit, whatever the batch
            size and the other images, on one device with one number of threads.
        conditions: Of a model of texts: prompts, used in turn, with their guidance.
        size: Height and width of its latents; those of the model's reference resolution by default.
        schedule: Configuration of its scheduler; FLUX.1-dev's by default.
        on_progress: Told after each step how many images are done, a step counting as its share of its batch.
        world: Processes that share the batches, one after the other in turn. Batches are those of one process, and so are images.

    Returns:
        This process's batches, in the order of the images.

    Raises:
        DyditError: For settings that do not fit the model, for samples that are not finite, or if dopri5 gives up.
    """
    require(family_of(model), "dydit sample")
    settings = check_settings(
        family_of(model).objective,
        model.geometry.num_classes,
        classes=classes,
        num_images=num_images,
        steps=steps,
        guidance=guidance,
        guidance_channels=guidance_channels,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        deterministic=deterministic,
    )
    if conditions is not None:
        settings = replace(settings, classes=tuple(range(len(conditions))), guidance=Guidance(1.0))
    elif family_of(model).objective == "rectified-flow":
        raise DyditError(
            "There is nothing to draw.",
            why=f"A {family_of(model).title} model draws prompts.",
            fix="Pass conditions: the embeddings of prompts.",
        )
    if schedule is not None:
        settings = replace(settings, sampler=settings.sampler.on(schedule))
    shape = model.geometry.sample_shape
    if size is not None:
        shape = (*shape[:-2], *size)
    return _generated(model, settings, shape, conditions, on_progress or (lambda done: None), world)


def _generated(
    model: DynamicModel,
    settings: GenerationSettings,
    shape: tuple[int, ...],
    conditions: TextCondition | None,
    on_progress: Progress,
    world: World,
) -> Iterator[Batch]:
    sampler = settings.sampler
    times = sampler.times_at(settings.steps, shape)
    if model.execution == "compact" and times is not None:
        # The width routers read t alone: the whole schedule is decided in one call, and no step asks them again.
        known = None if conditions is not None else settings.labels_of_run(model.geometry.num_classes)
        model.plan(times, known)
    on_device = conditions.to(model.device) if conditions is not None else None
    for number, indices in enumerate(settings.batches()):
        if not world.has(number):
            continue
        labels = tuple(settings.label(index) for index in indices)
        numbers = torch.tensor(labels, device=model.device)
        field = GuidedField(model, numbers if on_device is None else on_device[numbers], settings.guidance)
        noise = ImageNoise(settings.seed, indices, shape, model.device)
        # Left before a batch is handed out: the setting is the process's, and what the caller does with a batch is not ours.
        with deterministic_kernels() if settings.deterministic else nullcontext():
            model.begin_run()
            sample = start = noise.start()
            for step, state in enumerate(sampler.integrate(field, start, settings.steps, noise), start=1):
                sample = state
                on_progress(indices[0] + len(indices) * min(1.0, step / settings.steps))
        on_progress(indices[-1] + 1)
        _check_finite(sample, indices, model)
        yield Batch(indices, labels, sample, field.meter.mean(len(indices)), field.meter.evaluations)


def _check_finite(samples: Tensor, indices: tuple[int, ...], model: DynamicModel) -> None:
    finite = torch.isfinite(samples).flatten(1).all(dim=1)
    if bool(finite.all()):
        return
    broken = indices[int((~finite).nonzero()[0])]
    half = model.dtype in (torch.float16, torch.bfloat16)
    raise DyditError(
        f"Image {broken} came out with values that are not finite.",
        why=f"The model ran in {str(model.dtype).removeprefix('torch.')}, and its predictions overflowed or were not numbers.",
        fix="Run with --dtype float32."
        if half
        else "Check the weights: a training run that diverged leaves such a model.",
    )
