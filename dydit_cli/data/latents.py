"""Ready latents: an autoencoder's samples, or its posterior, with the scale that they state.

``scale`` is what the stored numbers are multiplied by to become the model's input (0.18215 for Stable
Diffusion's autoencoder, 1 if that was done before saving). A file that does not say it is refused: the two
cases differ by a factor of five and train without complaint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dydit_cli.data.source import Draw, SampleGeometry, checked_labels, sample_shape
from dydit_cli.errors import DyditError
from dydit_cli.randomness import normal

LATENT_NAMES = ("latents", "latent", "moments", "samples", "x", "arr_0")
LABEL_NAMES = ("labels", "label", "classes", "class_labels", "y", "arr_1")
SCALE_NAMES = ("scale", "scaling_factor")


@dataclass
class _SafetensorsRows:
    """Rows of one tensor of a .safetensors file, read from disk when asked for; travels to worker
    processes by its path.
    """

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self, indices: Sequence[int]) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                rows = file.get_slice(self.name)
                return torch.stack([rows[index] for index in indices]).float()
        except (SafetensorError, OSError) as error:
            raise DyditError(
                f"{self.path} can no longer be read.",
                why=f"{error}.",
                fix="Check that the file is still there and whole.",
            ) from error


@dataclass
class _ArrayRows:
    """Rows of an array in memory or mapped from a .npy file."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.asarray(self.array[list(indices)], dtype=np.float32))


class Latents:
    """Latents of an autoencoder, as samples (n, C, h, w) or as posteriors (n, 2C, h, w), mean before log
    variance; of videos (n, F, C, h, w) or (n, F, 2C, h, w).

    Args:
        rows: Where the numbers lie.
        labels: (n,) int64.
        scale: What they are multiplied by.
        posterior: Whether they are posteriors, drawn afresh whenever they are read.
        path: The file, for the manifest and for errors.
    """

    def __init__(
        self,
        rows: _ArrayRows | _SafetensorsRows,
        labels: Tensor,
        *,
        scale: float,
        posterior: bool,
        path: Path,
    ) -> None:
        self.rows = rows
        self.labels = labels
        self.scale = scale
        self.posterior = posterior
        self.path = path

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        """See `Source`."""
        return str(index)

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> Tensor:
        """See `Source`. Without ``draw``, sample k of a posterior is the one that its index alone decides.

        Raises:
            DyditError: for numbers that are not finite.
        """
        stored = self.rows.read(indices)
        if not bool(torch.isfinite(stored).all()):
            broken = next(
                index
                for index, row in zip(indices, stored, strict=True)
                if not bool(torch.isfinite(row).all())
            )
            raise DyditError(
                f"Latent {broken} of {self.path} holds numbers that are not finite.",
                why="It has NaN or infinite values; half precision overflows above 65504.",
                fix="Encode that image again in float32.",
            )
        if self.posterior:
            mean, log_variance = stored.chunk(2, dim=-3)
            # The clamp of Stable Diffusion's DiagonalGaussianDistribution.
            deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
            shape = tuple(mean.shape[1:])
            noise = [
                normal(0, shape, "posterior", index) if draw is None else draw(k, shape)
                for k, index in enumerate(indices)
            ]
            stored = mean + deviation * torch.stack(noise)
        return stored * self.scale

    def sample(self, index: int) -> tuple[Tensor, int]:
        """See `Source`."""
        return self.batch([index])[0], int(self.labels[index])

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "kind": "latent posteriors" if self.posterior else "latents",
            "path": str(self.path),
            "samples": len(self),
            "scale": self.scale,
        }

    def deviation(self) -> float:
        """Standard deviation of the first samples after scaling; near 1 where the scale is right."""
        return float(self.batch(range(min(64, len(self)))).std())


def read_npy(path: Path, geometry: SampleGeometry) -> Latents:
    """Read latents from a plain array; ``NAME.json`` beside it states the scale and holds or names the
    labels.

    Raises:
        DyditError: for a missing description, scale or labels, or latents that do not fit the model.
    """
    array = _loaded(path)
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise _no_scale(
            path, f"A .npy file holds one array and nothing else, and there is no {beside.name} beside it"
        )
    try:
        stated = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DyditError(
            f"{beside} cannot be read.",
            why=f"{error}.",
            fix='Write it as {"scale": 0.18215, "labels": "labels.npy"}.',
        ) from error
    if not isinstance(stated, dict):
        raise _no_scale(path, f"{beside.name} is not a JSON object")
    labels = stated.get("labels")
    if isinstance(labels, str):
        labels = _loaded(path.parent / labels)
    return _checked(_ArrayRows(array), labels, _scale(stated, path), path, geometry)


def from_arrays(arrays: Mapping[str, NDArray[Any]], path: Path, geometry: SampleGeometry) -> Latents:
    """Make latents of the arrays of an .npz file.

    Raises:
        DyditError: for a missing scale or labels, or latents that do not fit the model.
    """
    latents = _named(arrays, LATENT_NAMES, path, "latents")
    labels = next((arrays[name] for name in LABEL_NAMES if name in arrays), None)
    return _checked(_ArrayRows(latents), labels, _scale(arrays, path), path, geometry)


def read_safetensors(path: Path, geometry: SampleGeometry) -> Latents:
    """Read latents from a .safetensors file; the scale is a tensor or an entry of the metadata.

    Raises:
        DyditError: for a damaged file, a missing scale or labels, or latents that do not fit the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            stated: dict[str, Any] = dict(file.metadata() or {})
            stated |= {name: file.get_tensor(name) for name in SCALE_NAMES if name in names}
            label_name = next((name for name in LABEL_NAMES if name in names), None)
            labels = file.get_tensor(label_name).numpy() if label_name else None
            latent_name = next((name for name in LATENT_NAMES if name in names), None)
            shape = tuple(file.get_slice(latent_name).get_shape()) if latent_name else ()
    except (SafetensorError, OSError) as error:
        raise DyditError(
            f"{path} is not a readable .safetensors file.",
            why=f"{error}.",
            fix="Write the file again; it may be truncated.",
        ) from error
    if latent_name is None:
        raise _no_array(path, names, LATENT_NAMES, "latents")
    return _checked(_SafetensorsRows(path, latent_name, shape), labels, _scale(stated, path), path, geometry)


def _checked(
    rows: _ArrayRows | _SafetensorsRows, labels: object, scale: float, path: Path, geometry: SampleGeometry
) -> Latents:
    *frames, channels, size, _ = sample_shape(geometry)
    samples, posteriors = (*frames, channels, size, size), (*frames, 2 * channels, size, size)
    if rows.shape[1:] not in (samples, posteriors):
        raise DyditError(
            f"{path} holds latents of shape {rows.shape}.",
            why=f"The model takes (n, {', '.join(map(str, samples))}), or (n, {', '.join(map(str, posteriors))}) "
            "for means and log variances.",
            fix="Encode the videos frame by frame at the resolution of the model, frames before channels."
            if frames
            else "Encode the images at the resolution of the model, channels first.",
        )
    if labels is None and geometry.num_classes > 1:
        raise DyditError(
            f"{path} has no labels.",
            why=f"The model is class-conditional; labels are looked for under {', '.join(LABEL_NAMES)}.",
            fix="Store one integer a sample as `labels`.",
        )
    checked = checked_labels(labels, rows.shape[0], geometry.num_classes, path)
    return Latents(rows, checked, scale=scale, posterior=rows.shape[1:] == posteriors, path=path)


def _scale(stated: Mapping[str, Any], path: Path) -> float:
    value = next((stated[name] for name in SCALE_NAMES if name in stated), None)
    if value is None:
        raise _no_scale(
            path,
            "Latents are stored before or after their multiplication by the autoencoder's scaling factor",
        )
    try:
        scale = float(value)
    except (TypeError, ValueError) as error:
        raise _no_scale(path, f"What it states is no number: {value!r}") from error
    if not (np.isfinite(scale) and scale > 0):
        raise _no_scale(path, f"It states {scale:g}; a scale is a positive number")
    return scale


def _no_scale(path: Path, why: str) -> DyditError:
    how = {
        ".npy": f'Write {path.with_suffix(".json").name} as {{"scale": 0.18215, "labels": "labels.npy"}}',
        ".npz": "Add an entry `scale` with numpy.savez(…, scale=0.18215)",
    }.get(path.suffix.lower(), 'Save with metadata={"scale": "0.18215"}')
    return DyditError(
        f"{path} does not state the scale of its latents.",
        why=f"{why}.",
        fix=f"{how}: the number that the stored values are multiplied by (1 if they are scaled already).",
    )


def _named(arrays: Mapping[str, NDArray[Any]], names: Sequence[str], path: Path, what: str) -> NDArray[Any]:
    for name in names:
        if name in arrays:
            return arrays[name]
    raise _no_array(path, set(arrays), names, what)


def _no_array(path: Path, found: set[str], names: Sequence[str], what: str) -> DyditError:
    return DyditError(
        f"{path} has no array of {what}.",
        why=f"It holds {', '.join(sorted(found)) or 'nothing'}; {what} are looked for under "
        f"{', '.join(names)}.",
        fix=f"Save them as `{names[0]}`.",
    )


def _loaded(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DyditError(
            f"{path} cannot be read as an array.",
            why=f"{error}.",
            fix="Save it again with numpy.save, as numbers; it may be truncated.",
        ) from error
    if not isinstance(array, np.ndarray):
        raise DyditError(
            f"{path} is an archive, not an array.",
            why="Its content is that of an .npz file.",
            fix="Give it the suffix .npz.",
        )
    return array
