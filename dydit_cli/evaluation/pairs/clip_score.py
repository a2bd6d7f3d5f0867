"""CLIP score: 100 · max(cos(image, text), 0) (Hessel et al., arXiv 2104.08718, with the scale that most programs print)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.errors import DyditError

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's own training, for all published sizes."""


@dataclass(frozen=True)
class ClipScore:
    """A local CLIP model and its tokenizer."""

    model: Any
    tokenizer: Any
    sha256: str
    device: torch.device

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(N,) fp64 of (N, H, W, C) bytes and as many prompts."""
        parts = []
        for start in range(0, len(images), 32):
            rows, texts = images[start : start + 32], prompts[start : start + 32]
            # The projected embeddings of CLIP's own forward: what its convenience methods return changed between versions.
            tokens = self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            found = self.model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=self._pixels(rows),
            )
            cosines = F.cosine_similarity(found.image_embeds.cpu().double(), found.text_embeds.cpu().double())
            parts.append(100 * cosines.clamp(min=0))
        return torch.cat(parts)

    def _pixels(self, images: Tensor) -> Tensor:
        """Shorter side to CLIP's size (bicubic, smoothed), centre crop, CLIP's normalisation."""
        size = int(self.model.config.vision_config.image_size)
        planes = images.to(self.device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 255
        height, width = planes.shape[2:]
        shorter = min(height, width)
        target = (round(height * size / shorter), round(width * size / shorter))
        resized = F.interpolate(planes, size=target, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        cropped = resized[:, :, top : top + size, left : left + size]
        mean, deviation = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION)
        )
        return (cropped - mean) / deviation


def open_clip(folder: Path, device: torch.device) -> ClipScore:
    """Load a CLIP model that transformers can read, from a local folder.

    Raises:
        DyditError: If there is none.
    """
    bring = "Pass --clip a local folder of a CLIP model (config.json, model.safetensors and the tokenizer's files)."
    weights = folder / "model.safetensors"
    if not weights.is_file() or not (folder / "config.json").is_file():
        raise DyditError(
            f"There is no CLIP model at {folder}.",
            why="It has no config.json and model.safetensors."
            if folder.is_dir()
            else "No such folder exists.",
            fix=bring,
        )
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DyditError(
            f"The CLIP model at {folder} cannot be loaded.", why=said[:200], fix=bring
        ) from error
    return ClipScore(model.eval().requires_grad_(False).to(device), tokenizer, file_hash(weights), device)


def read_prompts(path: Path, labels: list[int] | None, count: int) -> list[str]:
    """The prompt of each image: a line an image, or a line a class where classes are known.

    Raises:
        DyditError: If the lines are neither.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DyditError(
            f"The prompts in {path} cannot be read.", why=f"{error}.", fix="Pass --prompts a text file."
        ) from error
    if len(lines) == count:
        return lines
    if labels is not None and lines and max(labels) < len(lines):
        return [lines[label] for label in labels]
    raise DyditError(
        f"{path} has {len(lines)} prompts for {count} images.",
        why="A file of prompts has a line for each image, or one for each class.",
        fix="Write one line for each.",
    )
