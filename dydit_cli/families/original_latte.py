"""The original Latte file layout: DiT's keys and a table of frames, with a table of classes or without.

The files of ``extras: 1`` (FaceForensics, SkyTimelapse, Taichi-HD) know no classes, those of ``extras: 2`` (UCF101) do. Those of
``extras: 78`` read text and are refused. The text-to-video form that diffusers ships has other keys and another reader.

Source: Vchitect/Latte, models/latte.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.families import original_dit
from dydit_cli.families.family import Hints, Source

FRAME_TABLE = "temp_embed"
TEXT_PROJECTION = "text_embedding_projection."


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a Latte of this form; the table of frames tells it from a DiT."""
    return all(key in tensors for key in (*original_dit.BACKBONE_KEYS, FRAME_TABLE))


def read(tensors: Mapping[str, Tensor], hints: Hints) -> Source:
    """Infer the configuration, the number of frames included, and rename routers to our names.

    Raises:
        DyditError: As `original_dit.read`, and for a file that reads text.
    """
    if any(key.startswith(TEXT_PROJECTION) for key in tensors):
        raise DyditError(
            "The checkpoint is a Latte that is conditioned on text embeddings (extras: 78).",
            why="It projects the text states of its training set, which neither a class nor a prompt of today replaces.",
            fix="Bring a class-conditional (extras: 2) or unconditional (extras: 1) Latte.",
        )
    source = original_dit.read(tensors, hints)
    original_dit.check_axes(tensors, {FRAME_TABLE: 3})
    return replace(source, config=source.config | {"num_frames": tensors[FRAME_TABLE].shape[1]})


write = original_dit.write
