"""The keys of a recipe, stage by stage: the one list of what can be set, its type, its range and its default.

Every section can be built in Python as well (`FinetuneSection(model="runs/c", data="images/", out="runs/t", steps=400)`)
and is frozen. Unknown keys are refused. Values that the papers do not give are marked "ours" (arXiv 2410.03456 is the paper
meant; its released code is "the code").

Relative paths refer to the folder in which the command runs, so that a recipe copied into an artifact still works from
the place where it was first used.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from dydit_cli.recipe.values import (
    Budgets,
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
    Real,
    Seed,
    Share,
    Sides,
    Text,
    names,
)

SCHEMA_VERSION = 1

MOMENTARY_KEYS = frozenset({"resume", "overwrite"})
"""Keys that say how a command was started and not what it makes; a resolved recipe leaves them out."""

Dtype = Literal["float32", "bfloat16", "float16"]

ExportFormat = Literal[
    "diffusers", "original", "static", "baked", "pruned", "torch-export", "onnx", "comfyui"
]

Names = Annotated[tuple[Text, ...], BeforeValidator(names)]

VideoFormats = Annotated[tuple[Literal["mp4", "gif", "frames", "grid"], ...], BeforeValidator(names)]

Conditions = Annotated[tuple[Text, ...], BeforeValidator(names)]

Trackers = Annotated[tuple[Literal["jsonl", "tensorboard", "wandb"], ...], BeforeValidator(names)]


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
        checkpoint: A `.pt` or `.safetensors` file, a folder, a repository of the Hub (`owner/name`), or `builtin:NAME` for a packaged
            base model.
        out: The folder to write.
        family: Which architecture the tensors belong to: `dit`, `sit`, `latte`, `latte-t2v` or `flux`; `auto` asks the tensors, which
            cannot tell a SiT from a DiT.
        num_heads: Attention heads, where neither the file nor a published width says how many.
        num_groups: Channel groups of the MLP; as many as heads if not given (the paper).
        grouping: Whether channels are sorted by importance before they are cut into groups, or cut as they stand (ours).
        width: Which masks heads and channel groups can have: `free` (any set of units, the paper) or `ordered` (the most important
            ones: slicing them is a view, never a copy; ours), or one of a plug-in.
        lora: FLUX: adapters to merge before the ranking, `FILE:SCALE` each; a key that fits no layer is an error.
        axes_dims_rope: FLUX: how a head's channels are shared among the rotary axes, where heads have other than 128 (16,56,56).
        prune: DiT, SiT: make a static model instead of a dynamic one: cut heads and channels out for good, until this share of attention
            and MLP MACs is left (a baseline).
        importance: `magnitude`, `taylor`, `random`, or an `importance.safetensors` of an earlier conversion; `auto` is `magnitude`, and
            with `calibrate` `taylor` on its data.
        importance_samples: Samples that Taylor importance averages over (ours).
        data: Where Taylor importance finds its samples; what `finetune.data` takes.
        calibrate: Data on which the width routers are set before any training, each range of timesteps by what it needs (ours).
        calibrate_ratio: λ that they are set to, by width alone.
        calibrate_samples: Samples of each round of that measurement.
        calibrate_ranges: Ranges of timesteps that get widths of their own.
        seed: Seed of random importance, of the Taylor and calibration samples, and of the routers' weights.
        device: Where scores are computed and the result is verified: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
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
    width: Text = "free"
    lora: Names | None = None
    axes_dims_rope: Sides | None = None
    prune: Share | None = None
    importance: Location = "auto"
    importance_samples: Count = 256
    data: Location | None = None
    calibrate: Location | None = None
    calibrate_ratio: Share = 0.8
    calibrate_samples: Count = 128
    calibrate_ranges: Count = 8
    seed: Seed = 0
    device: Text = "auto"
    max_shard_size: Text = "5GB"
    overwrite: Flag = False

    @model_validator(mode="after")
    def _taylor_needs_data(self) -> Self:
        if self.importance == "taylor" and self.data is None and self.calibrate is None:
            raise ValueError("importance 'taylor' is measured on samples; give data as well")
        return self


class FinetuneSection(Section):
    """Train a converted model until its realised ratio of MACs is `target_ratio`.

    Attributes:
        model: The folder of a converted (or already trained) model.
        data: An image folder, IDX files, an `.npz`, ready latents, or `fashion-mnist-subset`; for a video model, a folder of
            videos (`FOLDER:frame_interval=2`), an `.npz`, ready latents, or `moving-fashion-mnist`.
        out: The folder to write.
        steps: Optimiser steps.
        target_ratio: λ, the share of the static model's attention and MLP MACs to keep.
        target: What `target_ratio` is a share of: `macs`, or, of DiT and SiT, `latency`, the static model's time (ours).
        latency_table: DiT, SiT: times of the device that the model is for, as `dydit bench --latency-table FILE` measures them.
        budgets: DiT, SiT, Latte: least and largest ratio of a model that serves all between them; each step draws one, tells it to the
            routers, and trains for it. `target_ratio` is then what the result does unless told otherwise (ours).
        routers: Which routers decide, and learn to: `learned` (all of them), or a baseline: `width` or `tokens` alone, `random` decisions.
        batch_size: Samples of a step, over all processes and parts (the paper: 256).
        seed: Every random draw is a function of it.
        method: What trains beside the routers: `full` (all weights), `lora`, or `td-lora` (LoRA whose experts are mixed by the timestep);
            adapters take less memory.
        lora_rank: Rank of the adapters (ours).
        lora_alpha: Adapters are multiplied by it over the rank; the rank if not given.
        lora_experts: Experts of TD-LoRA (ours).
        lora_dropout: Dropout of the adapters' input.
        base: How weights below adapters are stored while they are trained: `fp32`, `bf16`, `int8` or
            `nf4`, the last two where bitsandbytes is installed.
        learning_rate: AdamW's, constant (the paper: 1e-4).
        router_learning_rate: The routers' own; `learning_rate` if not given (ours).
        weight_decay: AdamW's (the paper: 0).
        max_grad_norm: Largest norm of the gradient, which is scaled down to it; off if not given (ours).
        ratio_weight: Weight of the ratio's loss (the paper: 1, its code: 2).
        full_width_steps: Steps with a target of 1.0 before the ramp.
        ramp_steps: Steps in which the target falls linearly to `target_ratio`.
        complete_branch_steps: Steps that also train the complete model on the same noisy batch (XL only).
        complete_branch_every: Of these steps, every how many does so; 4 costs a quarter of the second forward (ours).
        temperature: τ of the Gumbel-sigmoid, which widens gradients and moves no probability (the paper: 5).
        gating: How training decides masks: `gumbel` samples them with noise all along (the paper); `annealed` lets the noise fall to
            nothing after the ramp, so that training ends with the thresholds that evaluation uses (ours).
        anneal_steps: Steps after the ramp in which the noise falls; as many as the ramp has if not given.
        feedback: After the ramp, move the target of training by what the averaged weights' realised ratio misses (ours).
        calibrate: At the end, add to all router logits the one small number at which the realised ratio is the target (ours).
        loss: What is learned: `denoising` (the data's own targets) or `distillation` (the predictions that the complete model
            made before training, at guidance from 1 to 5); `auto` distils FLUX and denoises otherwise (ours).
        snr_gamma: DiT, Latte: γ of Min-SNR weighting, 5 in its paper: in training the squared error at signal-to-noise ratio r counts
            min(r, γ) / r, so that the nearly clean steps weigh less; all noise levels alike if not given (ours).
        timestep_location: FLUX: mean of the normal variable whose sigmoid draws timesteps.
        timestep_scale: FLUX: its standard deviation.
        timestep_shift: FLUX: whether these timesteps move with the resolution as the sampler's do.
        ema_decay: Decay of the averaged weights, which are what is evaluated and saved.
        label_dropout: Share of labels replaced by the null class.
        mirror: Mirror images at random; a list names labels that are never mirrored.
        num_workers: Processes that load data.
        on_bad_sample: Whether a sample that cannot be read ends the run (`error`), or another takes its place and it is counted
            (`skip`; at most 1 % of the samples).
        trackers: Where metrics go beside `metrics.jsonl`: `tensorboard`, `wandb`, where they are installed.
        processes: Processes that train together, each with its part of every batch; `--processes` starts them, torchrun can.
        sharding: What each process holds: the whole model (`ddp`), or its part of weights, averages and moments (`fsdp2`).
        accumulate: Parts in which a process goes through its part of a batch, to save memory; the numbers stay the same.
        optimiser: `adamw`, or `adamw8bit` with moments in 8 bits, where bitsandbytes is installed.
        mixed_precision: Autocast type of the forward pass; routers, ratio, optimiser and averages are float32 in any case.
        gradient_checkpointing: Recompute blocks in the backward pass to save memory.
        log_every: Steps between lines of metrics.
        evaluate_every: Steps between evaluations of the realised ratio; 0 means at the end only.
        evaluate_images: Held-out images of an evaluation (the reported ratio is defined on 1,000).
        sample_every: Steps between sample grids; 0 means none.
        checkpoint_every: Steps between checkpoints; 0 means at the end only.
        keep_checkpoints: Newest checkpoints kept.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
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
    target: Literal["macs", "latency"] = "macs"
    latency_table: Location | None = None
    budgets: Budgets | None = None
    routers: Text = "learned"
    batch_size: Count = 64
    seed: Seed = 0
    method: Literal["full", "lora", "td-lora"] = "full"
    lora_rank: Count = 4
    lora_alpha: Positive | None = None
    lora_experts: Count = 4
    lora_dropout: Probability = 0.0
    base: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"
    learning_rate: Positive = 1e-4
    router_learning_rate: Positive | None = None
    weight_decay: NonNegativeReal = 0.0
    max_grad_norm: Positive | None = None
    ratio_weight: NonNegativeReal = 1.0
    full_width_steps: NonNegative = 100
    ramp_steps: NonNegative = 1000
    complete_branch_steps: NonNegative = 0
    complete_branch_every: Count = 1
    temperature: Positive = 5.0
    gating: Literal["gumbel", "annealed"] = "gumbel"
    anneal_steps: NonNegative | None = None
    feedback: Flag = False
    calibrate: Flag = True
    loss: Literal["auto", "denoising", "distillation"] = "auto"
    snr_gamma: Positive | None = None
    timestep_location: Real = 0.0
    timestep_scale: Positive = 1.0
    timestep_shift: Flag = True
    ema_decay: Probability = 0.9999
    label_dropout: Probability = 0.1
    mirror: Mirror = True
    num_workers: NonNegative = 0
    on_bad_sample: Literal["error", "skip"] = "error"
    trackers: Trackers = ("jsonl",)
    processes: Count = 1
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    accumulate: Count = 1
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
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

    @model_validator(mode="after")
    def _time_needs_a_table(self) -> Self:
        if self.target == "latency" and self.latency_table is None:
            raise ValueError(
                "target 'latency' needs a latency_table, which `dydit bench --latency-table FILE` measures"
            )
        if self.target == "latency" and self.budgets is not None:
            raise ValueError("target 'latency' has one target_ratio; leave budgets out")
        return self

    @model_validator(mode="after")
    def _weights_are_of_denoising(self) -> Self:
        if self.snr_gamma is not None and self.loss == "distillation":
            raise ValueError("snr_gamma weights the loss 'denoising'; leave it out, or set loss to denoising")
        return self

    @model_validator(mode="after")
    def _batches_can_be_shared(self) -> Self:
        parts = self.processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {self.processes} processes in {self.accumulate} parts each; "
                f"make it a multiple of {parts}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit_together(self) -> Self:
        if self.method == "full" and self.base != "fp32":
            raise ValueError(
                f"base {self.base} is for frozen weights below adapters; with method full all weights train in fp32"
            )
        if self.method != "full" and self.sharding == "fsdp2":
            raise ValueError(
                f"sharding fsdp2 goes with method full, not with {self.method}; leave sharding at ddp"
            )
        return self

    @model_validator(mode="after")
    def _shards_fit_together(self) -> Self:
        if self.sharding == "fsdp2" and self.mixed_precision == "fp16":
            raise ValueError("sharding fsdp2 goes with mixed_precision no or bf16, not with fp16")
        if self.sharding == "fsdp2" and self.optimiser == "adamw8bit":
            raise ValueError(
                "sharding fsdp2 shares the moments among processes already; leave optimiser at adamw"
            )
        return self

    @model_validator(mode="after")
    def _budgets_are_a_range_with_the_target(self) -> Self:
        if self.budgets is None:
            return self
        if len(self.budgets) != 2 or self.budgets[0] >= self.budgets[1]:
            raise ValueError("budgets must be a least and a larger ratio, such as [0.3, 1.0]")
        if not self.budgets[0] <= self.target_ratio <= self.budgets[1]:
            raise ValueError("target_ratio must lie between the budgets")
        return self


class PrepareSection(Section):
    """Encode pictures, or draw latents from prompts, once before training.

    Attributes:
        data: Pictures: a folder with captions (`.txt` beside the images, or `metadata.jsonl`), webdataset tars, class folders,
            IDX files, or `fashion-mnist-subset`. Either these or `prompts`.
        prompts: FLUX: a file of prompts, one a line, from which the pipeline draws the latents itself.
        out: The folder to write.
        pipeline: FLUX: a local pipeline folder, or `builtin:NAME`: its text encoders read captions, its `vae` encodes. Without
            it, class labels are stored, for DiT and SiT.
        vae: A local autoencoder folder, where there is no pipeline, or in place of its own.
        caption: FLUX: a caption for pictures that have a class alone; `{class}` stands for its name, and `|` separates several.
        resolution: Side of the pictures in pixels; with several, each picture takes the largest that it fills.
        buckets: Whether pictures keep their shape, in sizes of the area of `resolution`; else all become squares.
        count: FLUX: latents to draw from prompts; one a prompt if not given.
        limit: Most pictures, evenly taken; all if not given.
        mirror: Encode mirrored pictures as well, which training then draws from.
        text_tokens: FLUX: length of prompts in tokens; the tokenizer's, at most 512, if not given.
        steps: FLUX: steps of drawing latents from prompts.
        guidance: FLUX: distilled guidance of that drawing.
        batch_size: Pictures in a forward.
        processes: Processes that encode pictures.
        seed: Latent i depends on the seed and i alone.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: Type of text encoders, of stored texts, and of drawing; pictures are always encoded in float32.
        resume: Go on with an unfinished folder.
        overwrite: Replace an existing one.
    """

    stage: ClassVar[str] = "prepare"

    data: Location | None = None
    prompts: Location | None = None
    out: OutFolder
    pipeline: Location | None = None
    vae: Location | None = None
    caption: Text | None = None
    resolution: Sides = (256,)
    buckets: Flag = True
    count: Count | None = None
    limit: Count | None = None
    mirror: Flag = False
    text_tokens: Count | None = None
    steps: Count = 28
    guidance: NonNegativeReal = 3.5
    batch_size: Count = 8
    processes: Count = 1
    seed: Seed = 0
    device: Text = "auto"
    dtype: Dtype = "float32"
    resume: Flag = False
    overwrite: Flag = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.data is None) == (self.prompts is None):
            raise ValueError("needs either data (pictures) or prompts" + (", not both" if self.data else ""))
        if self.prompts is not None and self.pipeline is None:
            raise ValueError("prompts need a pipeline, which draws the latents")
        if self.pipeline is None and self.vae is None:
            raise ValueError("needs a pipeline (captions) or a vae (classes)")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other; give one of the two")
        if min(self.resolution) < 1:
            raise ValueError("resolution must be at least 1")
        return self


class ProfileSection(Section):
    """Count MACs and parameters, per timestep and block, and measure time and memory.

    Attributes:
        model: The folder of a model. Either this or `preset`.
        preset: Name of a published size such as `dit-xl/2`, built with fresh weights.
        budget: DiT, SiT, Latte: the ratio to run at, of a model trained for a range of them.
        data: Held-out images that the token routers see; if not given, the data that the model's manifest names, else the shipped
            images where they fit, else noise.
        images: Held-out images, or videos, that the ratio is the mean over.
        timesteps: Evenly spaced timesteps of that mean, each with its share of the images.
        batch_size: Images a forward of the ratio's evaluation.
        latency: Measure time and memory as well.
        latency_batch: Images a forward of the time measurement.
        repetitions: Interleaved pairs of the time measurement, of which the median counts.
        compile: Measure the time of static and compact execution with compiled blocks.
        graphs: Measure the time of static and compact execution with steps recorded as CUDA graphs.
        trajectory: Also report the ratio on the sampler's own states.
        seed: Seed of every draw.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: Type of weights and activations of the time measurement.
        report: A file of HTML that shows all of it, with samples of the static and the dynamic model; none if not given.
        out: A folder for the JSON file and the pictures; none is written if not given.
        overwrite: Replace an existing folder or report.
    """

    stage: ClassVar[str] = "profile"
    parents: ClassVar[tuple[str, ...]] = ("finetune", "convert")

    model: Location | None = None
    preset: Text | None = None
    budget: Share | None = None
    data: Location | None = None
    images: Count = 1000
    timesteps: Count = 50
    batch_size: Count = 64
    latency: Flag = True
    latency_batch: Count = 4
    repetitions: Count = 11
    compile: Flag = False
    graphs: Flag = False
    trajectory: Flag = True
    seed: Seed = 0
    device: Text = "auto"
    dtype: Dtype = "float32"
    report: Location | None = None
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
        classes: DiT, SiT, Latte: labels, used in turn; all labels in turn if not given.
        num_images: Images to draw.
        steps: Steps of the sampler (for an ODE: intervals).
        guidance: Classifier-free guidance scale; 1 runs no second branch (1.5 for FID, 4.0 for pictures). Of FLUX, the strength
            that the model takes as an input. If not given, 1.5, and 3.5 for FLUX.
        guidance_channels: Noise channels that guidance acts on: as many as the `original` code guides (DiT and SiT three,
            Latte four), the `first3`, or `all`.
        sampler: A sampler of the model's family; `ddpm` for DiT and Latte, `euler` for SiT and FLUX if not given.
        prompt: FLUX: a prompt, or several separated by `|`. Either this, `prompts` or `cache`.
        prompts: FLUX: a file of prompts, one a line, used in turn.
        cache: FLUX: conditions out of a prepared cache, used in turn.
        pipeline: FLUX: a local pipeline folder, or `builtin:NAME`: its text encoders read prompts, its `vae` decodes, and its
            scheduler's configuration says how noise levels move with the resolution.
        height, width: FLUX: of the images, in pixels; the model's reference resolution if not given.
        seed: Image i depends on (seed, i) alone.
        batch_size: Images a forward.
        execution: `compact` skips what the routers switch off, `dense` multiplies it by zero, `static` ignores the routers.
        compile: Compile the model's blocks with `torch.compile`, for compact and static execution.
        graphs: Record whole steps as CUDA graphs, for compact and static execution on a CUDA device.
        token_capacity: Room in the MLPs for this share of a batch's tokens, which makes shapes static, for compact execution;
            none, or with `graphs` as much as turns out to be needed, if not given.
        keep_bias: Added to every router logit: a dial without training; `inf` keeps everything.
        budget: DiT, SiT, Latte: the ratio to run at, of a model trained for a range of them.
        vae: A local AutoencoderKL folder; latents are saved if not given.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: Type of weights and activations.
        deterministic: Make each image alone, so that it is the same bit for bit whatever the batch size.
        processes: Processes that share the batches; no image depends on their number.
        video_formats: Latte: what the samples become beside `samples.npz`: files a video (`mp4`, `gif`), a folder of its frames
            (`frames`), and pictures of the first videos (`grid`).
        fps: Latte: frames a second of these files; a GIF shows at most 50.
        overwrite: Replace an existing artifact.
    """

    stage: ClassVar[str] = "sample"
    parents: ClassVar[tuple[str, ...]] = ("finetune", "convert")

    model: Location
    out: OutFolder
    classes: Labels | None = None
    num_images: Count = 8
    steps: Count = 50
    guidance: NonNegativeReal | None = None
    guidance_channels: Literal["original", "first3", "all"] = "original"
    sampler: Literal["ddpm", "ddim", "dpm++", "euler", "heun", "dopri5", "sde"] | None = None
    prompt: Text | None = None
    prompts: Location | None = None
    cache: Location | None = None
    pipeline: Location | None = None
    height: Count | None = None
    width: Count | None = None
    seed: Seed = 0
    batch_size: Count = 32
    execution: Literal["compact", "dense", "static"] = "compact"
    compile: Flag = False
    graphs: Flag = False
    token_capacity: Share | None = None
    keep_bias: Dial = 0.0
    budget: Share | None = None
    vae: Location | None = None
    device: Text = "auto"
    dtype: Dtype = "float32"
    deterministic: Flag = False
    processes: Count = 1
    video_formats: VideoFormats = ("mp4", "gif", "grid")
    fps: Positive = 8.0
    overwrite: Flag = False

    @model_validator(mode="after")
    def _keep_bias_is_a_dial(self) -> Self:
        if self.keep_bias == -math.inf:
            raise ValueError(
                "keep_bias of minus infinity switches every unit off; give a finite value or inf"
            )
        return self


class EvaluateSection(Section):
    """Measure how good samples are, and how near a dynamic model stays to its static one.

    Attributes:
        model: The folder of a model, which is sampled. This or `samples`.
        samples: A folder of images or of frames, or an `.npz`; taken instead of the model where both are given.
        videos: Folders in a folder are videos and their images the frames, not classes.
        reference: What distances are to: statistics (`mu`, `sigma`), an `.npz`, a folder, or `fashion-mnist`; that is the default
            of the Fashion-MNIST network, and nothing of another.
        extractor: The network: `fashion-mnist`, a local Inception weights' file, or `auto` (the former, where it fits).
        resize: How Inception's input is resized; `auto` goes by the name of the weights' file, and is TensorFlow's way otherwise.
        against: A static model (or its images) to pair with, from the same seeds; `static`: the model's own weights, complete.
        yardstick_images: Pairs of each yardstick, at most; 0 measures none (ours).
        lpips: A folder with the weights of LPIPS, to measure it on the pairs.
        clip: A folder with a CLIP model, to measure its score on the pairs.
        prompts: A file with a line for each class or image, for CLIP.
        fail_if: Conditions such as `psnr<25` under which the command fails with exit code 1.
        statistics: Also write `statistics.npz`, the moments of the samples' features.
        num_images: Images to draw, or to take of a folder; of a folder all if not given, of a model 1,000 (ours).
        classes: Labels, used in turn; all labels in turn if not given.
        steps: Steps of the sampler.
        guidance: Classifier-free guidance scale.
        guidance_channels: As in `sample`.
        sampler: As in `sample`.
        seed: Image i depends on (seed, i) alone.
        batch_size: Images a forward.
        execution: As in `sample`.
        keep_bias: As in `sample`.
        budget: As in `sample`.
        vae: A local AutoencoderKL folder, for latent models.
        processes: Processes that share sampling and the feature network; no number depends on how many.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: Type of weights and activations of the model; features are always made in float32 and distances in float64.
        out: A folder for `evaluation.json` and the sheets of pairs; nothing is written if not given.
        overwrite: Replace an existing folder.
    """

    stage: ClassVar[str] = "evaluate"
    parents: ClassVar[tuple[str, ...]] = ("finetune", "convert")

    model: Location | None = None
    samples: Location | None = None
    videos: Flag = False
    reference: Location | None = None
    extractor: Location = "auto"
    resize: Literal["auto", "tensorflow", "pytorch-fid"] = "auto"
    against: Location | None = None
    yardstick_images: NonNegative = 256
    lpips: Location | None = None
    clip: Location | None = None
    prompts: Location | None = None
    fail_if: Conditions | None = None
    statistics: Flag = False
    num_images: Count | None = None
    classes: Labels | None = None
    steps: Count = 50
    guidance: NonNegativeReal = 1.5
    guidance_channels: Literal["original", "first3", "all"] = "original"
    sampler: Literal["ddpm", "ddim", "dpm++", "euler", "heun", "dopri5", "sde"] | None = None
    seed: Seed = 0
    batch_size: Count = 32
    execution: Literal["compact", "dense", "static"] = "compact"
    keep_bias: Dial = 0.0
    budget: Share | None = None
    vae: Location | None = None
    processes: Count = 1
    device: Text = "auto"
    dtype: Dtype = "float32"
    out: OutFolder | None = None
    overwrite: Flag = False

    @model_validator(mode="after")
    def _something_to_evaluate(self) -> Self:
        if self.model is None and self.samples is None:
            raise ValueError("needs a model folder, or samples")
        return self


class ExportSection(Section):
    """Write a model for use elsewhere.

    Attributes:
        model: The folder of a model.
        out: The folder to write.
        format: `diffusers` (a folder that a stock pipeline runs), `original` (the source's layout plus routers), `static` (the
            complete model in the source's layout), `baked` (a pipeline folder whose widths are written down for one schedule),
            `pruned` (a static model of one timestep's width), `torch-export`, `onnx` or `comfyui`.
        steps: Sampling steps of the schedule whose widths are written down; 50 if a format needs them and they are not given.
        sampler: The sampler whose timesteps they are, as `dydit sample` names it; if not given, the family's first one.
        timestep: DiT, SiT: the timestep whose width stays, in the family's own convention: 0 to 999 for DiT (999 is noise), 0 to
            1 for SiT (0 is noise).
        budget: DiT, SiT, Latte: the ratio that the exported model runs at, of a model trained for a range of them.
        max_shard_size: Largest weight file, as diffusers writes it.
        vae: A local AutoencoderKL folder to put into the pipeline.
        pipeline: FLUX: a local pipeline folder, or `builtin:NAME`, whose text encoders, tokenizers, `vae` and schedule are copied
            into the export.
        license: The licence that the model card states: an identifier such as `cc-by-nc-4.0`, or a name; the base model's if not given.
        measured: Folders of `dydit profile` and `dydit evaluate` whose results the model card shows.
        dtype: Type of the written weights; if not given, float32 for pipelines, programs and graphs of DiT, SiT and Latte, and the
            stored types otherwise.
        overwrite: Replace an existing artifact.
    """

    stage: ClassVar[str] = "export"
    parents: ClassVar[tuple[str, ...]] = ("finetune", "convert")

    model: Location
    out: OutFolder
    format: ExportFormat = "diffusers"
    steps: Count | None = None
    sampler: Text | None = None
    timestep: NonNegativeReal | None = None
    budget: Share | None = None
    max_shard_size: Text = "5GB"
    vae: Location | None = None
    pipeline: Location | None = None
    license: Text | None = None
    measured: Names | None = None
    dtype: Dtype | None = None
    overwrite: Flag = False


SECTIONS: dict[str, type[Section]] = {
    section.stage: section
    for section in (
        PrepareSection,
        ConvertSection,
        FinetuneSection,
        ProfileSection,
        SampleSection,
        EvaluateSection,
        ExportSection,
    )
}
"""The sections by name, in the order in which the stages follow each other."""
