"""Prompts to embeddings, as `FluxPipeline` computes them, with one text encoder in memory at a time.

T5-XXL alone takes 9.5 GB in bf16, so that CLIP goes before it comes.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.pipelines.folder import PipelineFolder

LONGEST = 512
"""Tokens of FLUX.1-dev's prompts; schnell was trained with 256."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a pipeline folder.

    Attributes:
        folder: The pipeline.
        device: Where they run.
        dtype: What they run in, and what the embeddings come in.
        max_tokens: Length of the sequence; None for what the tokenizer says, at most 512.
        batch_size: Prompts in a forward.
    """

    folder: PipelineFolder
    device: torch.device
    dtype: torch.dtype = torch.float32
    max_tokens: int | None = None
    batch_size: int = 32

    @property
    def tokens(self) -> int:
        """T, to which every prompt is padded or cut."""
        config = self.folder.config("tokenizer_2", "tokenizer_config.json")
        # Tokenizers without a limit state an astronomical one.
        return self.max_tokens or min(LONGEST, int(config.get("model_max_length", LONGEST)))

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], on_progress: Progress = lambda what, done, total: None
    ) -> TextCondition:
        """The embeddings of prompts, on the CPU, in the encoders' dtype; guidance is left open."""
        with self._loaded("tokenizer", "text_encoder") as (tokenizer, encoder):
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            pooled = self._run(
                prompts, tokenizer, length, lambda ids: encoder(ids).pooler_output, "CLIP", on_progress
            )
        with self._loaded("tokenizer_2", "text_encoder_2") as (tokenizer, encoder):
            sequence = self._run(
                prompts, tokenizer, self.tokens, lambda ids: encoder(ids)[0], "T5", on_progress
            )
        return TextCondition(sequence, pooled)

    def _run(
        self,
        prompts: Sequence[str],
        tokenizer: Any,
        length: int,
        encoder: Callable[[Tensor], Tensor],
        what: str,
        on_progress: Progress,
    ) -> Tensor:
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            on_progress(f"encoding prompts ({what})", start, len(prompts))
            given = tokenizer(
                list(prompts[start : start + self.batch_size]),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            parts.append(encoder(given.input_ids.to(self.device)).to(self.dtype).cpu())
        on_progress(f"encoding prompts ({what})", len(prompts), len(prompts))
        return torch.cat(parts)

    @contextlib.contextmanager
    def _loaded(self, tokenizer: str, encoder: str) -> Iterator[tuple[Any, Any]]:
        """A tokenizer and its encoder, which is freed afterwards."""
        import transformers

        kinds: dict[str, Any] = {
            "text_encoder": transformers.CLIPTextModel,
            "text_encoder_2": transformers.T5EncoderModel,
        }
        where = {name: str(self.folder.part(name)) for name in (tokenizer, encoder)}
        try:
            with warnings.catch_warnings(), _without_bars():
                warnings.simplefilter("ignore")
                words = transformers.AutoTokenizer.from_pretrained(where[tokenizer], local_files_only=True)
                model = kinds[encoder].from_pretrained(
                    # A pickled weight file is code; every FLUX pipeline has safetensors.
                    where[encoder],
                    dtype=self.dtype,
                    local_files_only=True,
                    use_safetensors=True,
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise DyditError(
                f"The {encoder} of the pipeline in {self.folder.path} cannot be loaded.",
                why=f"A file of {tokenizer}/ or {encoder}/ is missing or damaged: {said}",
                fix="Copy the pipeline's folder again.",
            ) from error
        model = model.to(self.device).eval().requires_grad_(False)
        try:
            yield words, model
        finally:
            del model
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars among ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
