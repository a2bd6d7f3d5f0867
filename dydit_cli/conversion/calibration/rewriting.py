"""Routers into an artifact that is written already, as those of a streamed conversion are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit_cli.artifacts import atomic_write

WEIGHTS = "diffusion_pytorch_model*.safetensors"


def rewrite_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace tensors of an artifact, each in its file and of its type there; other files are not touched.

    Args:
        folder: Of the artifact; one of its weight files fits into memory.
        tensors: By key. All of them are in the artifact.

    Raises:
        KeyError: If one is not.
    """
    missing = set(tensors)
    for file in sorted(folder.glob(WEIGHTS)):
        with safe_open(file, framework="pt", device="cpu") as stored:
            here, metadata = missing & set(stored.keys()), stored.metadata()
        if not here:
            continue
        content = load_file(file)
        content |= {key: tensors[key].to("cpu", content[key].dtype).contiguous() for key in here}
        with atomic_write(file) as temporary:
            save_file(content, temporary, metadata=metadata)
        missing -= here
    if missing:
        raise KeyError(f"not in {folder}: {', '.join(sorted(missing)[:3])}")
