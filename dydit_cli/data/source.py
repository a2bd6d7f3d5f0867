"""What a data set is to the rest of the package: labelled tensors that are read by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dydit_cli.errors import DyditError

Draw = Callable[[int, tuple[int, ...]], Tensor]
"""Standard normal noise of a shape for the k-th sample of a batch; posterior latents and clips of videos use it."""


class SampleGeometry(Protocol):
    """What data must know of a model; `dydit_cli.dynamic.geometry.Geometry` has it."""

    @property
    def sample_size(self) -> int:
        """Side of the (square) input in pixels or latent pixels."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes without the null class."""
        ...


@runtime_checkable
class VideoGeometry(SampleGeometry, Protocol):
    """What data must know of a model that may take videos; see `of_video`."""

    @property
    def num_frames(self) -> int:
        """Frames of the input; 0 for images."""
        ...


def of_video(geometry: SampleGeometry) -> VideoGeometry | None:
    """The geometry of a model that takes videos, None of one that takes images."""
    return geometry if isinstance(geometry, VideoGeometry) and geometry.num_frames else None


def sample_shape(geometry: SampleGeometry) -> tuple[int, ...]:
    """(C, size, size), or (F, C, size, size) of videos."""
    video = of_video(geometry)
    image = (geometry.in_channels, geometry.sample_size, geometry.sample_size)
    return image if video is None else (video.num_frames, *image)


class Source(Protocol):
    """Labelled samples in the model's input space: images or videos in [-1, 1], or scaled latents.

    Shapes are written for images; videos have a dimension of frames before the channels.

    Attributes:
        labels: (n,) int64.
        keys: A stable name of each sample; the hold-out hashes them.
    """

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class labels."""
        ...

    def key(self, index: int) -> str:
        """A name of the sample that stays the same from run to run; the hold-out hashes it."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """(b, C, size, size) fp32 samples; posterior latents are drawn with ``draw``, or by index alone
        without it.
        """
        ...

    def sample(self, index: int) -> tuple[Tensor, int]:
        """(C, size, size) fp32 sample and its label, a function of the index alone."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records: kind, path, number of samples."""
        ...


class Subset:
    """Some samples of a source, as a source.

    Args:
        source: The source of all samples.
        indices: Which of them, in this order.
    """

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.labels = source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        """See `Source`."""
        return self.source.key(int(self.indices[index]))

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """See `Source`."""
        return self.source.batch([int(self.indices[index]) for index in indices], draw)

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.source.sample(int(self.indices[index]))

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {**self.source.describe(), "samples": len(self)}


def checked_labels(labels: object, count: int, num_classes: int, where: Path) -> Tensor:
    """Return labels as (count,) int64.

    A model without classes gives every sample the label 0; so does one of a single class to samples without labels.

    Raises:
        DyditError: if they are not whole numbers, not one a sample, or out of the model's range.
    """
    if num_classes == 0 or (num_classes == 1 and labels is None):
        return torch.zeros(count, dtype=torch.int64)
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) != count:
        raise DyditError(
            f"{where} has {count} samples but labels of shape {tuple(array.shape)}.",
            why="Each sample needs exactly one class label.",
            fix="Store the labels as one integer a sample, in the order of the samples.",
        )
    if array.dtype.kind not in "iub" and not (
        array.dtype.kind == "f" and bool((array == np.floor(array)).all())
    ):
        raise DyditError(
            f"The labels in {where} are not whole numbers.",
            why=f"They have the type {array.dtype}; a class label is an integer from 0 to {num_classes - 1}.",
            fix="Store the labels as integers.",
        )
    wrong = np.flatnonzero((array < 0) | (array >= num_classes))
    if len(wrong):
        raise DyditError(
            f"Sample {wrong[0]} of {where} has the label {int(array[wrong[0]])}, which the model does not "
            "have.",
            why=f"The model has {num_classes} classes: labels go from 0 to {num_classes - 1}; {len(wrong)} "
            "labels are outside.",
            fix="Renumber the labels from 0, or use a model with as many classes as the data.",
        )
    return torch.from_numpy(array.astype(np.int64))


def refuse_images_for_latent_model(where: Path, geometry: SampleGeometry) -> DyditError:
    """The error for images or videos handed to a model that lives in a VAE's latent space."""
    kind = "images" if of_video(geometry) is None else "videos"
    return DyditError(
        f"{where} holds {kind}, but the model is trained on latents.",
        why=f"The model takes {geometry.in_channels} channels of "
        f"{geometry.sample_size}x{geometry.sample_size}: "
        "the latents of an autoencoder, not pixels.",
        fix=f"Encode the {kind} with the model's autoencoder and give the latents as .npz or .safetensors "
        "(latents, labels and scale).",
    )
