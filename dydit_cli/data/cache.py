"""Prepared samples: a folder of latents, and of texts or labels, as `dydit prepare` writes it.

``cache.json`` lists the files. Each ``latents_*.safetensors`` holds samples of one shape: ``latents`` (n, C, h, w), or ``moments``
(n, 2C, h, w) with means before log variances; the same of the mirrored images as ``mirrored``; and ``labels`` or, in a cache of
texts, ``texts``, (n,) numbers into the distinct texts. Each ``text_*.safetensors`` holds ``prompt_embeds`` (m, T, D) and ``pooled``
(m, P) of texts in order: a caption that a thousand images share is stored once. ``samples.jsonl`` names the samples and
``prompts.jsonl`` the texts. Stored numbers are the autoencoder's own: the model's input is (stored - shift) * scale.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dydit_cli.data.source import Draw
from dydit_cli.errors import DyditError
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.randomness import normal

INDEX = "cache.json"
SAMPLES = "samples.jsonl"
PROMPTS = "prompts.jsonl"
VERSION = 1
CLAMP = (-30.0, 20.0)
"""Of log variances, as diffusers' DiagonalGaussianDistribution has it."""


@dataclass(frozen=True)
class LatentShard:
    """One file of samples of one shape.

    Attributes:
        file: Its name.
        samples: n.
        height, width: Of the latents.
    """

    file: str
    samples: int
    height: int
    width: int


@dataclass(frozen=True)
class TextShard:
    """One file of texts.

    Attributes:
        file: Its name.
        texts: m.
    """

    file: str
    texts: int


@dataclass(frozen=True)
class TextShape:
    """What the text encoders gave.

    Attributes:
        tokens: T, of every text.
        width: D, of the sequence.
        pooled: P.
    """

    tokens: int
    width: int
    pooled: int


@dataclass(frozen=True)
class CacheIndex:
    """What ``cache.json`` says.

    Attributes:
        channels: C of the latents.
        scale: What latents are multiplied by for the model,
        shift: after this was subtracted.
        posterior: Whether means and log variances are stored.
        mirrored: Whether the mirrored images are there as well.
        latents: Files of samples, in order.
        classes: Names of the labels; empty in a cache of texts.
        text: What the texts look like; None in a cache of classes.
        texts: Files of texts, in order.
    """

    channels: int
    scale: float
    shift: float
    posterior: bool
    mirrored: bool
    latents: tuple[LatentShard, ...]
    classes: tuple[str, ...] = ()
    text: TextShape | None = None
    texts: tuple[TextShard, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The content of ``cache.json``."""
        return {"version": VERSION, **asdict(self)}


def is_cache(folder: Path) -> bool:
    """Whether a folder was made by `dydit prepare`."""
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> CacheIndex:
    """Read ``cache.json``.

    Raises:
        DyditError: if it is damaged or of another version, or if a file that it lists is not there.
    """
    try:
        stated = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version = stated.pop("version")
        text = stated.pop("text")
        index = CacheIndex(
            **stated
            | {
                "latents": tuple(LatentShard(**shard) for shard in stated["latents"]),
                "texts": tuple(TextShard(**shard) for shard in stated["texts"]),
                "classes": tuple(stated["classes"]),
                "text": None if text is None else TextShape(**text),
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DyditError(
            f"{folder / INDEX} cannot be read.",
            why=f"It is not the list of a cache's files ({type(error).__name__}: {error}).",
            fix="Run `dydit prepare` again with --overwrite.",
        ) from error
    if version != VERSION:
        raise DyditError(
            f"The cache in {folder} is of version {version}.",
            why=f"This dydit reads version {VERSION}.",
            fix="Run `dydit prepare` again with --overwrite.",
        )
    files = [*(shard.file for shard in index.latents), *(shard.file for shard in index.texts)]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise DyditError(
            f"The cache in {folder} is not whole.",
            why=f"{len(missing)} of its files are missing, the first is {missing[0]}.",
            fix="Copy the whole folder again, or run `dydit prepare` again with --overwrite.",
        )
    return index


@dataclass
class CachedLatents:
    """The latents of a cache, read from disk when asked for; a copy in another process opens its own files.

    Attributes:
        folder: The cache.
        index: What it holds.
    """

    folder: Path
    index: CacheIndex
    _ends: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        total = 0
        for shard in self.index.latents:
            total += shard.samples
            self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @cached_property
    def numbers(self) -> Tensor:
        """(n,) int64: the labels, or the texts, of the samples."""
        name = "texts" if self.index.text is not None else "labels"
        parts = [self._read(shard.file, name, None) for shard in self.index.latents]
        return torch.cat(parts).long() if parts else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def keys(self) -> list[str]:
        """A stable name of each sample."""
        lines = (self.folder / SAMPLES).read_text(encoding="utf-8").splitlines()
        return [str(json.loads(line)["key"]) for line in lines]

    @cached_property
    def buckets(self) -> Tensor:
        """(n,) int64: samples of one number have latents of one size."""
        sizes = sorted({(shard.height, shard.width) for shard in self.index.latents})
        numbers = [sizes.index((shard.height, shard.width)) for shard in self.index.latents]
        return torch.repeat_interleave(
            torch.tensor(numbers, dtype=torch.int64),
            torch.tensor([shard.samples for shard in self.index.latents]),
        )

    def batch(
        self, indices: Sequence[int], draw: Draw | None = None, flips: Sequence[bool] | None = None
    ) -> Tensor:
        """(b, C, h, w) at the model's scale.

        Args:
            indices: Of one bucket.
            draw: Noise of posterior samples; without it, sample k is the one that its index alone decides.
            flips: Which of them are read from their mirrored images.

        Raises:
            DyditError: for numbers that are not finite, and for a damaged file.
        """
        stored = self._rows(indices, flips or [False] * len(indices))
        finite = torch.isfinite(stored).flatten(1).all(dim=1)
        if not bool(finite.all()):
            broken = indices[int((~finite).nonzero()[0])]
            raise DyditError(
                f"The latents of '{self.keys[broken]}' in {self.folder} are not finite.",
                why="They hold NaN or infinite values; half precision overflows above 65504.",
                fix="Run `dydit prepare` again with --dtype float32 and --overwrite.",
            )
        if self.index.posterior:
            mean, log_variance = stored.chunk(2, dim=1)
            shape = tuple(mean.shape[1:])
            noise = [
                normal(0, shape, "posterior", index) if draw is None else draw(k, shape)
                for k, index in enumerate(indices)
            ]
            stored = mean + torch.exp(0.5 * log_variance.clamp(*CLAMP)) * torch.stack(noise)
        return (stored - self.index.shift) * self.index.scale

    def _rows(self, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        name = "moments" if self.index.posterior else "latents"
        rows: dict[int, Tensor] = {}
        by_file: dict[tuple[int, bool], list[int]] = {}
        for place, (index, flip) in enumerate(zip(indices, flips, strict=True)):
            by_file.setdefault((bisect_right(self._ends, index), flip), []).append(place)
        for (shard, flip), places in by_file.items():
            start = self._ends[shard] - self.index.latents[shard].samples
            wanted = [indices[place] - start for place in places]
            found = self._read(self.index.latents[shard].file, "mirrored" if flip else name, wanted)
            rows |= dict(zip(places, found.float(), strict=True))
        return torch.stack([rows[place] for place in range(len(indices))])

    def _read(self, file: str, name: str, rows: Sequence[int] | None) -> Tensor:
        return read_rows(self.folder / file, name, rows)


@dataclass
class CachedTexts:
    """The texts of a cache.

    Attributes:
        folder: The cache.
        index: What it holds.
    """

    folder: Path
    index: CacheIndex

    @cached_property
    def prompts(self) -> list[str]:
        """The texts."""
        lines = (self.folder / PROMPTS).read_text(encoding="utf-8").splitlines()
        return [str(json.loads(line)["prompt"]) for line in lines]

    def conditions(self, numbers: Sequence[int], guidance: float | None = None) -> TextCondition:
        """The texts with these numbers, each read once, with a strength of guidance for models that take one."""
        distinct = sorted(set(numbers))
        place = {number: row for row, number in enumerate(distinct)}
        parts, start = [], 0
        for shard in self.index.texts:
            rows = [number - start for number in distinct if start <= number < start + shard.texts]
            start += shard.texts
            if rows:
                file = self.folder / shard.file
                parts.append([read_rows(file, name, rows).float() for name in ("prompt_embeds", "pooled")])
        prompt_embeds, pooled = (torch.cat(column) for column in zip(*parts, strict=True))
        order = torch.tensor([place[number] for number in numbers], dtype=torch.long)
        strength = None if guidance is None else torch.full((len(numbers),), guidance)
        return TextCondition(prompt_embeds[order], pooled[order], strength)


def read_rows(path: Path, name: str, rows: Sequence[int] | None) -> Tensor:
    """Some rows of a tensor of a .safetensors file, or all of it.

    Raises:
        DyditError: if the file is damaged or holds no such tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if rows is None:
                return file.get_tensor(name)
            stored = file.get_slice(name)
            return torch.stack([stored[row] for row in rows])
    except (SafetensorError, OSError) as error:
        raise DyditError(
            f"{path} cannot be read.",
            why=f"{error}.",
            fix="Copy the cache again, or delete this file and run `dydit prepare` again with --resume.",
        ) from error
