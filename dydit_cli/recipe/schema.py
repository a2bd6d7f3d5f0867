"""The keys of a recipe, stage by stage: the one list of what can be set, its type, its range and its default.

Every section can be built in Python as well (`FinetuneSection(model="runs/c", data="images/", out="runs/t", steps=400)`)
and is frozen. Unknown keys are refused. Values that the papers do not give are marked "ours" (arXiv 2410.03456 is the paper
meant; its released code is "the code").

Relative paths refer to the folder in which the command runs, so that a recipe copied into an artifact still works from
the place where it was first used.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from dydit_cli.recipe.values import (
    Count,
    Dial,
    Flag,
    Labels,
    Location,
    Mirror,
    NonNegative,
    NonNegativeReal,
    OutFolder,
    Positive,
    Probability,
    Seed,
    Share,
    Text,
)

SCHEMA_VERSION = 1

MOMENTARY_KEYS = frozenset({"resume", "overwrite"})
"""Keys that say how a command was started and not what it makes; a resolved recipe leaves them out."""

Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """What the sections share: frozen, no unknown keys, and whose `out` their `model` falls back to.

    Attributes:
        stage: The section's name, which is the command's name.
        parents: Stages whose `out` is this stage's default `model`, the nearest first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    stage: ClassVar[str]
    parents: ClassVar[tuple[str, ...]] = ()


class ConvertSection(Section):
    """Turn a static checkpoint into a dynamic model.

    Attributes:
        checkpoint: A `.pt` or `.safetensors` file, a folder, or `builtin:NAME` for a packaged base model.
        out: The folder to write.
        family: Which architecture the tensors belong to; `auto` asks the tensors.
        num_heads: Attention heads, where the file cannot say.
        num_groups: Channel groups of the MLP; as many as heads if not given (the paper).
        grouping: Whether channels are sorted by importance before they are cut into groups, or cut as they stand (ours).
        importance: `magnitude`, `taylor`, `random`, or an `importance.safetensors` of an earlier conversion.
        importance_samples: Samples that Taylor importance averages over (ours).
        data: Where Taylor importance finds its samples.
        seed: Seed of random importance, of the Taylor samples and of the routers' weights.
        device: Where scores are computed and the result is verified.
        max_shard_size: Largest weight file, as diffusers writes it.
        overwrite: Replace an existing artifact.
    """

    stage: ClassVar[str] = "convert"

    checkpoint: Location
    out: OutFolder
    family: Text = "auto"
    num_heads: Count | None = None
    num_groups: Count | None = None
    grouping: Literal["sorted", "contiguous"] = "sorted"
    importance: Location = "magnitude"
    importance_samples: Count = 256
    data: Location | None = None
    seed: Seed = 0
    device: Text = "auto"
    max_shard_size: Text = "5GB"
    overwrite: Flag = False

    @model_validator(mode="after")
    def _taylor_needs_data(self) -> Self:
        if self.importance == "taylor" and self.data is None:
            raise ValueError("importance 'taylor' is measured on samples; give data as well")
        return self


class FinetuneSection(Section):
    """Train a converted model until its realised ratio of MACs is `target_ratio`.

    Attributes:
        model: The folder of a converted (or already trained) model.
        data: An image folder, IDX files, an `.npz`, ready latents, or `fashion-mnist-subset`.
        out: The folder to write.
        steps: Optimiser steps.
        target_ratio: λ, the share of the static model's attention and MLP MACs to keep.
        batch_size: Global batch (the paper: 256).
        seed: Every random draw is a function of it.
        learning_rate: AdamW's, constant (the paper: 1e-4).
        router_learning_rate: The routers' own; `learning_rate` if not given (ours).
        weight_decay: AdamW's.
        max_grad_norm: Gradient clipping; off if not given (ours).
        ratio_weight: Weight of the ratio's loss (the paper: 1, its code: 2).
        full_width_steps: Steps with a target of 1.0 before the ramp.
        ramp_steps: Steps in which the target falls linearly to `target_ratio`.
        complete_branch_steps: Steps that also train the complete model on the same noisy batch (XL only).
        temperature: τ of the Gumbel-sigmoid.
        ema_decay: Decay of the averaged weights, which are what is evaluated and saved.
        label_dropout: Share of labels replaced by the null class.
        mirror: Mirror images at random; a list names labels that are never mirrored.
        num_workers: Processes that load data.
        mixed_precision: Autocast type of the forward pass.
        gradient_checkpointing: Recompute blocks in the backward pass to save memory.
        log_every: Steps between lines of metrics.
        evaluate_every: Steps between evaluations of the realised ratio; 0 means at the end only.
        evaluate_images: Held-out images of an evaluation (the reported ratio is defined on 1,000).
        sample_every: Steps between sample grids; 0 means none.
        checkpoint_every: Steps between checkpoints; 0 means at the end only.
        keep_checkpoints: Newest checkpoints kept.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resume: Continue in `out` from its newest checkpoint.
        overwrite: Replace an existing artifact.
    """

    stage: ClassVar[str] = "finetune"
    parents: ClassVar[tuple[str, ...]] = ("convert",)

    model: Location
    data: Location
    out: OutFolder
    steps: Count
    target_ratio: Share = 0.5
    batch_size: Count = 64
    seed: Seed = 0
    learning_rate: Positive = 1e-4
    router_learning_rate: Positive | None = None
    weight_decay: NonNegativeReal = 0.0
    max_grad_norm: Positive | None = None
    ratio_weight: NonNegativeReal = 1.0
    full_width_steps: NonNegative = 100
    ramp_steps: NonNegative = 1000
    complete_branch_steps: NonNegative = 0
    temperature: Positive = 5.0
    ema_decay: Probability = 0.9999
    label_dropout: Probability = 0.1
    mirror: Mirror = True
    num_workers: NonNegative = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: Flag = False
    log_every: Count = 10
    evaluate_every: NonNegative = 100
    evaluate_images: Count = 1000
    sample_every: NonNegative = 0
    checkpoint_every: NonNegative = 500
    keep_checkpoints: Count = 2
    device: Text = "auto"
    resume: Flag = False
    overwrite: Flag = False

    @model_validator(mode="after")
    def _resume_keeps_what_overwrite_removes(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other; give one of the two")
        return self


class ProfileSection(Section):
    """Count MACs and parameters, per timestep and block, and measure time and memory.

    Attributes:
        model: The folder of a model; or
        preset: the name of a published size such as `dit-xl/2`, built with fresh weights.
        data: Held-out images that the token routers see; noise alone if not given.
        images: Held-out images.
        timesteps: Stratified timesteps.
        batch_size: Images a forward of the ratio's evaluation.
        latency: Measure time and memory as well.
        latency_batch: Images a forward of the time measurement.
        repetitions: Interleaved pairs of the time measurement, of which the median counts.
        compile: Measure the time of static and compact execution with compiled blocks.
        trajectory: Also report the ratio on the sampler's own states.
        seed: Seed of every draw.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Type of weights and activations of the time measurement.
        out: A folder for the JSON file and the pictures; none is written if not given.
        overwrite: Replace an existing folder.
    """

    stage: ClassVar[str] = "profile"
    parents: ClassVar[tuple[str, ...]] = ("finetune", "convert")

    model: Location | None = None
    preset: Text | None = None
    data: Location | None = None
    images: Count = 1000
    timesteps: Count = 50
    batch_size: Count = 64
    latency: Flag = True
    latency_batch: Count = 4
    repetitions: Count = 11
    compile: Flag = False
    trajectory: Flag = True
    seed: Seed = 0
    device: Text = "auto"
    dtype: Dtype = "float32"
    out: OutFolder | None = None
    overwrite: Flag = False

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.preset is None):
            raise ValueError("needs either a model folder or a preset" + (", not both" if self.model else ""))
        return self


class SampleSection(Section):
    """Draw images.

    Attributes:
        model: The folder of a model.
        out: The folder to write.
        classes: Labels, used in turn; all labels in turn if not given.
        num_images: Images to draw.
        steps: Steps of the sampler (for an ODE: intervals).
        guidance: Classifier-free guidance scale; 1 runs no second branch (1.5 for FID, 4.0 for pictures).
        guidance_channels: Whether guidance acts on the first three noise channels, as the original code does, or on all.
        sampler: A sampler of the model's family; `ddpm` for DiT and `euler` for SiT if not given.
        seed: Image i depends on (seed, i) alone.
        batch_size: Images a forward.
        execution: `compact` skips what the routers switch off, `dense` multiplies it by zero, `static` ignores the routers.
        compile: Compile the model's blocks with `torch.compile`, for compact and static execution.
        keep_bias: Added to every router logit: a dial without training; `inf` keeps everything.
        vae: A local AutoencoderKL folder; latents are saved if not given.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Type of weights and activations.
        deterministic: Make each image alone, so that it is the same bit for bit whatever the batch size.
        overwrite: Replace an existing artifact.
    """

    stage: ClassVar[str] = "sample"
    parents: ClassVar[tuple[str, ...]] = ("finetune", "convert")

    model: Location
    out: OutFolder
    classes: Labels | None = None
    num_images: Count = 8
    steps: Count = 50
    guidance: NonNegativeReal = 1.5
    guidance_channels: Literal["first3", "all"] = "first3"
    sampler: Literal["ddpm", "ddim", "dpm++", "euler", "heun", "dopri5", "sde"] | None = None
    seed: Seed = 0
    batch_size: Count = 32
    execution: Literal["compact", "dense", "static"] = "compact"
    compile: Flag = False
    keep_bias: Dial = 0.0
    vae: Location | None = None
    device: Text = "auto"
    dtype: Dtype = "float32"
    deterministic: Flag = False
    overwrite: Flag = False

    @model_validator(mode="after")
    def _keep_bias_is_a_dial(self) -> Self:
        if self.keep_bias == -math.inf:
            raise ValueError(
                "keep_bias of minus infinity switches every unit off; give a finite value or inf"
            )
        return self


class ExportSection(Section):
    """Write a model for use elsewhere.

    Attributes:
        model: The folder of a model.
        out: The folder to write.
        format: `diffusers` (a folder that a stock pipeline runs), `original` (the source's layout plus routers) or
            `static` (the complete model in the source's layout).
        max_shard_size: Largest weight file, as diffusers writes it.
        vae: A local AutoencoderKL folder to put into the pipeline.
        dtype: Type of the written weights; float32 for a pipeline and the source's own otherwise, if not given.
        overwrite: Replace an existing artifact.
    """

    stage: ClassVar[str] = "export"
    parents: ClassVar[tuple[str, ...]] = ("finetune", "convert")

    model: Location
    out: OutFolder
    format: Literal["diffusers", "original", "static"] = "diffusers"
    max_shard_size: Text = "5GB"
    vae: Location | None = None
    dtype: Dtype | None = None
    overwrite: Flag = False


SECTIONS: dict[str, type[Section]] = {
    section.stage: section
    for section in (ConvertSection, FinetuneSection, ProfileSection, SampleSection, ExportSection)
}
"""The sections by name, in the order in which the stages follow each other."""
