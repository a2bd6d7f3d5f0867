"""Captions to files of embeddings, each distinct caption once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dydit_cli.artifacts import atomic_write
from dydit_cli.data.cache import PROMPTS, TextShape, TextShard
from dydit_cli.pipelines.text import TextEncoders

TEXTS_A_SHARD = 512
"""2 GB of FLUX.1-dev's embeddings in bf16."""

Progress = Callable[[str, int, int], None]


def write_texts(
    out: Path, prompts: Sequence[str], encoders: TextEncoders, on_progress: Progress
) -> tuple[TextShape, tuple[TextShard, ...]]:
    """Encode the distinct ``prompts`` and write them; files of an earlier run with the same texts stay.

    Returns:
        What they look like, and the files.
    """
    shards = []
    for number, start in enumerate(range(0, len(prompts), TEXTS_A_SHARD)):
        part = list(prompts[start : start + TEXTS_A_SHARD])
        file = f"text_{number:05d}.safetensors"
        shards.append(TextShard(file, len(part)))
        digest = hashlib.sha256(json.dumps([part, encoders.tokens, str(encoders.dtype)]).encode()).hexdigest()
        if _plan_of(out / file) == digest:
            continue
        encoded = encoders.encode(part, on_progress)
        tensors = {"prompt_embeds": encoded.prompt_embeds, "pooled": encoded.pooled}
        with atomic_write(out / file) as temporary:
            save_file(tensors, temporary, metadata={"plan": digest})
        (out / file).chmod(0o644)
    with atomic_write(out / PROMPTS) as temporary:
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with safe_open(out / shards[0].file, framework="pt") as stored:
        _, tokens, width = stored.get_slice("prompt_embeds").get_shape()
        pooled = stored.get_slice("pooled").get_shape()[1]
    return TextShape(tokens, width, pooled), tuple(shards)


def _plan_of(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("plan")
    except (OSError, SafetensorError):
        return None
