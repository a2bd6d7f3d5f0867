"""Latents without pictures: the user's own pipeline draws them from prompts.

For self-distillation nothing else is needed: what the model is asked about are the states of its own world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.artifacts import atomic_write
from dydit_cli.errors import DyditError
from dydit_cli.pipelines.autoencoder import Autoencoder
from dydit_cli.pipelines.folder import PipelineFolder
from dydit_cli.preparation.shards import PlannedShard
from dydit_cli.randomness import generator

Progress = Callable[[int], None]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are passed over.

    Raises:
        DyditError: if it cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DyditError(
            f"The prompts in {path} cannot be read.",
            why=f"{error}.",
            fix="Give a text file in UTF-8 with one prompt a line.",
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DyditError(
            f"{path} holds no prompts.",
            why="Every line of it is empty.",
            fix="Write one prompt a line.",
        )
    return prompts


@dataclass(frozen=True)
class GenerationJob:
    """What drawing latents needs.

    Attributes:
        out: The cache's folder.
        pipeline: The user's pipeline, transformer included.
        autoencoder: Its autoencoder, for the sizes.
        tokens: Length of prompts.
        steps: Of its scheduler.
        guidance: Distilled guidance.
        seed: Sample i depends on (seed, i) alone.
        batch_size: Samples in a forward.
        device, dtype: Where and in what it runs.
    """

    out: Path
    pipeline: PipelineFolder
    autoencoder: Autoencoder
    tokens: int
    steps: int
    guidance: float
    seed: int
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    def run(self, shards: Sequence[PlannedShard], on_progress: Progress) -> None:
        """Draw and write some shards; ``on_progress`` hears how many samples are done."""
        pipe = self._loaded()
        done = 0
        for shard in shards:
            parts = []
            for start in range(0, len(shard.pictures), self.batch_size):
                batch = shard.pictures[start : start + self.batch_size]
                parts.append(self._drawn(pipe, batch, shard))
                done += len(batch)
                on_progress(done)
            tensors = {"latents": torch.cat(parts).contiguous(), "texts": torch.tensor(shard.texts)}
            with atomic_write(self.out / shard.file) as temporary:
                save_file(tensors, temporary, metadata={"plan": shard.digest()})
            (self.out / shard.file).chmod(0o644)

    def _drawn(self, pipe: Any, batch: Sequence[Any], shard: PlannedShard) -> Tensor:
        packed = pipe(
            prompt=[picture.caption for picture in batch],
            height=shard.height,
            width=shard.width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            max_sequence_length=self.tokens,
            generator=[generator(self.seed, "prepare", picture.place) for picture in batch],
            output_type="latent",
        ).images
        latents: Tensor = pipe._unpack_latents(packed, shard.height, shard.width, pipe.vae_scale_factor)
        return latents.float().cpu()

    def _loaded(self) -> Any:
        """The pipeline of the user's folder; its own code is not run."""
        from diffusers import FluxPipeline

        self.pipeline.part("transformer")
        parts = {"vae": self.autoencoder.vae.to(self.dtype)}
        try:
            pipe = FluxPipeline.from_pretrained(
                str(self.pipeline.path),
                torch_dtype=self.dtype,
                local_files_only=True,
                use_safetensors=True,
                **parts,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise DyditError(
                f"The pipeline in {self.pipeline.path} cannot be loaded.",
                why=f"A part of it is missing or damaged: {said}",
                fix="Give the folder of a whole FLUX pipeline, or prepare pictures with --data.",
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)
