"""Which inputs a model is profiled on: given data, those it was trained on, those of the package, or noise.

Widths depend on the timestep alone and need no data. Tokens are chosen by looking at the image, so that their share, and with it the
ratio, is only as real as the images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.artifacts import read_manifest
from dydit_cli.data import Source, open_data
from dydit_cli.data.opening import MOVING, PACKAGED
from dydit_cli.data.source import Draw
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.errors import DyditError
from dydit_cli.randomness import generator, normal

PACKAGED_DATA = "fashion-mnist-subset"
PACKAGED_INPUT = (1, 32, 10)
"""Channels, side and classes of the packaged data, images and the videos made of them."""

GENERATIONS = 4
"""How many artifacts up the manifests are asked for data: an export of a fine-tuning of a fine-tuning of a conversion."""

NOISE_NOTE = (
    "Noise instead of images, because no data are given or known: widths are exact (they depend on t alone), "
    "tokens and every ratio are not those of real images. Pass --data."
)
PROMPTED_NOTE = (
    "Noise and an embedding of noise instead of samples and prompts: widths are exact (they depend on t alone), tokens and every "
    "ratio are not those of real samples."
)


@dataclass(frozen=True)
class Inputs:
    """What a model is profiled on.

    Attributes:
        source: Labelled samples.
        real: Whether they are data; noise otherwise.
        data: Name or path of the data, None for noise.
        note: What was used and why, for people.
    """

    source: Source
    real: bool
    data: str | None
    note: str


def find_inputs(
    geometry: Geometry,
    data: str | None,
    model: Path | None,
    noise_samples: int,
    seed: int,
    prompt: Any = None,
) -> Inputs:
    """Find inputs for a model.

    Args:
        geometry: The model's.
        data: What the user gave, if anything.
        model: The model's folder, whose manifest may name data.
        noise_samples: How many samples of noise to make where there is no data.
        seed: Of the noise.
        prompt: What goes with noise in models that read prompts: the condition of one sample. None for models that read labels.

    Raises:
        DyditError: If given data are missing, damaged, or do not fit the model.
    """
    if data is not None:
        return _held_out(geometry, data, "as given")
    named = data_of(model) if model is not None else None
    if named is not None:
        try:
            return _held_out(geometry, named, "the data set that the model was trained on")
        except DyditError:
            # What the manifest names may have changed since; nobody asked for it, so the next choice is taken.
            named = None
    if (geometry.in_channels, geometry.sample_size, geometry.num_classes) == PACKAGED_INPUT:
        packaged = MOVING if geometry.num_frames else PACKAGED_DATA
        return _held_out(geometry, packaged, "which comes with dydit and fits the model's input")
    return Inputs(
        source=NoiseSource(geometry, noise_samples, seed)
        if prompt is None
        else PromptedNoise(geometry, noise_samples, seed, prompt),
        real=False,
        data=None,
        note=NOISE_NOTE if prompt is None else PROMPTED_NOTE,
    )


def data_of(model: Path) -> str | None:
    """The data that a model's manifest names, or those of the artifacts it was made from; None if they are gone."""
    folder = model
    for _ in range(GENERATIONS):
        try:
            manifest = read_manifest(folder)
        except DyditError:
            return None
        data = (manifest.get("settings") or {}).get("data")
        if data and (data in (*PACKAGED, MOVING) or Path(data).expanduser().exists()):
            return str(data)
        parent = (manifest.get("parent") or {}).get("path")
        if parent is None:
            return None
        folder = Path(parent)
    return None


def _held_out(geometry: Geometry, data: str, why: str) -> Inputs:
    source = open_data(data, geometry=geometry).held_out
    return Inputs(source, True, data, f"{len(source):,} held-out samples of {data}, {why}.")


class NoiseSource:
    """Standard normal noise as samples: latents have about its variance, and nothing else in common with it.

    Args:
        geometry: Of the model.
        samples: How many.
        seed: Sample i depends on (seed, i) alone.
    """

    def __init__(self, geometry: Geometry, samples: int, seed: int) -> None:
        self._shape = geometry.sample_shape
        self._seed = seed
        # A model without classes has samples all the same.
        self.labels = torch.randint(
            max(1, geometry.num_classes), (samples,), generator=generator(seed, "noise_labels")
        )

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        """See `Source`."""
        return f"noise {self._seed} {index}"

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """See `Source`."""
        return torch.stack([normal(self._seed, self._shape, "noise_sample", index) for index in indices])

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.batch([index])[0], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {"kind": "noise", "samples": len(self), "seed": self._seed}


class PromptedNoise(NoiseSource):
    """Noise for a model that reads prompts.

    Args:
        geometry: Of the model.
        samples: How many.
        seed: Sample i depends on (seed, i) alone.
        prompt: The condition of every sample, a batch of one.
    """

    def __init__(self, geometry: Geometry, samples: int, seed: int, prompt: Any) -> None:
        super().__init__(geometry, samples, seed)
        self._prompt = prompt

    def conditions(self, indices: Sequence[int]) -> Any:
        """See `TextSource`."""
        return self._prompt[[0] * len(indices)]
