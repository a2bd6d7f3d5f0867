"""From what a user writes after ``--data`` to training and held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.data import held_out, latents
from dydit_cli.data.folder import ImageFolder, unpadded_numbers
from dydit_cli.data.idx import is_idx_folder, labels_digest, read_idx_folder
from dydit_cli.data.latents import Latents
from dydit_cli.data.mirror import FASHION_MNIST_NEVER, MirrorRule
from dydit_cli.data.npz import read_npz
from dydit_cli.data.source import SampleGeometry, Source, Subset, refuse_images_for_latent_model
from dydit_cli.errors import DyditError, did_you_mean

PACKAGED = {"fashion-mnist-subset": Path(__file__).parent.parent / "assets" / "fashion-mnist"}
"""Data sets inside the package: 10,000 training and 1,000 test images of Fashion-MNIST."""

LATENT_FILES = (".npz", ".npy", ".safetensors")


@dataclass(frozen=True)
class DataSplit:
    """An opened data set.

    Attributes:
        train: What training sees.
        held_out: What it never sees; the ratio and the held-out loss are measured there.
        held_out_from: Where the held-out samples come from: "t10k files" or "hash".
        mirror: The mirroring that suits this data set.
        warnings: What looked odd, for the console.
    """

    train: Source
    held_out: Source
    held_out_from: str
    mirror: MirrorRule
    warnings: tuple[str, ...] = ()

    def mirror_rule(self, setting: bool | Sequence[int]) -> MirrorRule:
        """The mirroring that a recipe asks for: true for the data set's own, false for none, or labels never
        mirrored.

        Raises:
            DyditError: for labels given with latents, which cannot be mirrored.
        """
        if isinstance(setting, bool):
            return self.mirror if setting else MirrorRule(False)
        if "latent" in self.train.describe()["kind"]:
            raise DyditError(
                "Latents cannot be mirrored while training.",
                why="The autoencoder gives a mirrored image other latents than the mirrored ones.",
                fix="Set mirror to false, and encode mirrored copies of the images if they are wanted.",
            )
        return MirrorRule(True, frozenset(setting))

    def describe(self) -> dict[str, Any]:
        """What the manifest records; ``labels_sha256`` tells a resumed run whether its data changed."""
        return {
            **self.train.describe(),
            "held_out": len(self.held_out),
            "held_out_from": self.held_out_from,
            "labels_sha256": labels_digest(self.train.labels),
        }


def open_data(spec: str | Path, *, geometry: SampleGeometry, latent: bool | None = None) -> DataSplit:
    """Open a data set for a model.

    Args:
        spec: ``fashion-mnist-subset`` (shipped), a folder of IDX files, a folder with a folder of images a
            class, an .npz file of images, or a .npy, .npz or .safetensors file of latents that states its
            scale.
        geometry: The model's input: ``sample_size``, ``in_channels``, ``num_classes``.
        latent: Whether the model lives in an autoencoder's latent space; by default, if it takes neither 1
            nor 3 channels.

    Raises:
        DyditError: for everything that is missing, damaged, or does not fit the model.
    """
    is_latent = geometry.in_channels not in (1, 3) if latent is None else latent
    packaged = PACKAGED.get(str(spec))
    path = packaged or Path(spec).expanduser()
    if not path.exists():
        raise DyditError(
            f"There is no data at {spec}.",
            why=f"No file, folder or shipped data set has this name. {did_you_mean(str(spec), PACKAGED)}".strip(),
            fix=f"Give an existing path, or {' or '.join(PACKAGED)}.",
        )
    if path.is_dir():
        return _open_folder(path, geometry, is_latent, fashion_mnist=packaged is not None)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _hashed(read_npz(path, geometry, latent=is_latent), geometry)
    if suffix == ".npy":
        return _hashed(latents.read_npy(path, geometry), geometry)
    if suffix == ".safetensors":
        return _hashed(latents.read_safetensors(path, geometry), geometry)
    raise DyditError(
        f"{path} is not a data file.",
        why=f"Data files end in {', '.join(LATENT_FILES)}; this one ends in {suffix or 'nothing'}.",
        fix="Give one of these, a folder of IDX files, or a folder with a folder of images a class.",
    )


def _open_folder(path: Path, geometry: SampleGeometry, is_latent: bool, *, fashion_mnist: bool) -> DataSplit:
    if is_idx_folder(path):
        if is_latent:
            raise refuse_images_for_latent_model(path, geometry)
        parts = read_idx_folder(path, geometry)
        # Other IDX sets are digits and letters as a rule, which a mirror spoils.
        known = fashion_mnist or parts.is_fashion_mnist
        mirror = MirrorRule(True, frozenset(FASHION_MNIST_NEVER)) if known else MirrorRule(False)
        if parts.held_out is not None and len(parts.train) and len(parts.held_out):
            return DataSplit(parts.train, parts.held_out, "t10k files", mirror)
        return _split_by_hash(parts.train, mirror, ())
    folder = ImageFolder(path, geometry)
    if is_latent:
        raise refuse_images_for_latent_model(path, geometry)
    return _split_by_hash(folder, MirrorRule(True), _class_warnings(folder, geometry))


def _hashed(source: Source, geometry: SampleGeometry) -> DataSplit:
    if isinstance(source, Latents):
        deviation = source.deviation()
        odd = not 1 / 3 < deviation < 3
        warning = (
            f"The latents have a standard deviation of {deviation:.2g} after their scale of "
            f"{source.scale:g}; about 1 is usual. "
            "Scale is what the stored numbers are multiplied by: 1 if they are scaled already."
        )
        return _split_by_hash(source, MirrorRule(False), (warning,) if odd else ())
    return _split_by_hash(source, MirrorRule(True), ())


def _split_by_hash(source: Source, mirror: MirrorRule, warnings: tuple[str, ...]) -> DataSplit:
    train, rest = held_out.split(source)
    return DataSplit(Subset(source, train), Subset(source, rest), "hash", mirror, warnings)


def _class_warnings(folder: ImageFolder, geometry: SampleGeometry) -> tuple[str, ...]:
    warnings = []
    present = len(torch.unique(folder.labels))
    if present < geometry.num_classes:
        warnings.append(
            f"{folder.folder} has {present} classes, the model {geometry.num_classes}: label 0 is "
            f"{folder.classes[0]!r}, "
            f"label {present - 1} is {folder.classes[-1]!r}."
        )
    if unpadded_numbers(folder.classes):
        warnings.append(
            f"The class folders of {folder.folder} are sorted as text ('10' before '2'), as in torchvision."
        )
    return tuple(warnings)
