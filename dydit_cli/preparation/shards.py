"""Writing a cache shard by shard: what a shard is, how it is encoded, and which are there already.

A shard is a function of the plan alone, so that it does not matter which process writes it, or in which run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dydit_cli.artifacts import atomic_write
from dydit_cli.data.folder import as_pixels
from dydit_cli.devices import find_device
from dydit_cli.pipelines.autoencoder import Autoencoder, open_autoencoder
from dydit_cli.preparation.cropping import cover_crop
from dydit_cli.preparation.pictures import Picture, Pictures

SAMPLES_A_SHARD = 1024


@dataclass(frozen=True)
class PlannedShard:
    """Samples that go into one file.

    Attributes:
        number: Of the file.
        width, height: Of the pictures, in pixels.
        pictures: In order.
        texts: Numbers of their captions; empty in a cache of classes.
    """

    number: int
    width: int
    height: int
    pictures: tuple[Picture, ...]
    texts: tuple[int, ...] = ()

    @property
    def file(self) -> str:
        """Its name."""
        return f"latents_{self.number:05d}.safetensors"

    def digest(self) -> str:
        """Of everything that decides what is in it."""
        content = [self.width, self.height, self.texts, [[p.key, p.label] for p in self.pictures]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class EncodingJob:
    """What encoding needs, in a form that other processes can be given.

    Attributes:
        out: The cache's folder.
        vae: The autoencoder's folder.
        pictures: The collection.
        mirror: Whether to encode mirrored pictures as well.
        batch_size: Pictures in a forward.
        device: Where to.
    """

    out: Path
    vae: Path
    pictures: Pictures
    mirror: bool
    batch_size: int
    device: str

    def run(self, shards: Sequence[PlannedShard]) -> None:
        """Encode and write some shards."""
        autoencoder = open_autoencoder(self.vae, find_device(self.device))
        for shard in shards:
            self.write(shard, autoencoder)

    def write(self, shard: PlannedShard, autoencoder: Autoencoder) -> None:
        """Encode and write one shard."""
        name = "moments" if autoencoder.posterior else "latents"
        tensors = {name: self._encode(shard, autoencoder, mirrored=False)}
        if self.mirror:
            tensors["mirrored"] = self._encode(shard, autoencoder, mirrored=True)
        if shard.texts:
            tensors["texts"] = torch.tensor(shard.texts)
        else:
            tensors["labels"] = torch.tensor([picture.label for picture in shard.pictures])
        with atomic_write(self.out / shard.file) as temporary:
            save_file(tensors, temporary, metadata={"plan": shard.digest()})
        (self.out / shard.file).chmod(0o644)

    def _encode(self, shard: PlannedShard, autoencoder: Autoencoder, *, mirrored: bool) -> Tensor:
        mode = "L" if autoencoder.image_channels == 1 else "RGB"
        parts = []
        for start in range(0, len(shard.pictures), self.batch_size):
            batch = [
                as_pixels(cover_crop(self.pictures.open(picture).convert(mode), shard.width, shard.height))
                for picture in shard.pictures[start : start + self.batch_size]
            ]
            pixels = torch.stack(batch)
            parts.append(autoencoder.moments(pixels.flip(-1) if mirrored else pixels))
        return torch.cat(parts).contiguous()


def is_written(out: Path, shard: PlannedShard) -> bool:
    """Whether an earlier run has written this very shard; files are whole or not there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(out / shard.file, framework="pt") as file:
            return bool((file.metadata() or {}).get("plan") == shard.digest())
    except (OSError, SafetensorError):
        return False
