"""From what a user writes after ``--data`` to training and held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dydit_cli.data import held_out, latents
from dydit_cli.data.cache import is_cache
from dydit_cli.data.cached import CachedSource
from dydit_cli.data.cached_text import CachedTextSource, TextGeometry
from dydit_cli.data.folder import ImageFolder, unpadded_numbers
from dydit_cli.data.idx import is_idx_folder, labels_digest, read_idx_folder
from dydit_cli.data.latents import Latents
from dydit_cli.data.mirror import FASHION_MNIST_NEVER, MirrorRule
from dydit_cli.data.moving import read_moving_garments
from dydit_cli.data.npz import read_npz
from dydit_cli.data.source import (
    SampleGeometry,
    Source,
    Subset,
    VideoGeometry,
    of_video,
    refuse_images_for_latent_model,
)
from dydit_cli.data.spec import parse_spec
from dydit_cli.data.videos import VideoFolder
from dydit_cli.errors import DyditError, did_you_mean

PACKAGED = {"fashion-mnist-subset": Path(__file__).parent.parent / "assets" / "fashion-mnist"}
"""Data sets inside the package: 10,000 training and 1,000 test images of Fashion-MNIST."""

MOVING = "moving-fashion-mnist"
"""Videos made from Fashion-MNIST's images: the packaged ones, or those of a folder named after a colon."""

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
        if "latent" in self.train.describe()["kind"] and not self.mirror.enabled:
            raise DyditError(
                "Latents cannot be mirrored while training.",
                why="The autoencoder gives a mirrored image other latents than the mirrored ones.",
                fix="Set mirror to false, or prepare the images with `dydit prepare`, which encodes their mirror images as well.",
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
            scale, or a folder that `dydit prepare` wrote. For a model of videos: ``moving-fashion-mnist``,
            ``moving-fashion-mnist:FOLDER`` (IDX files), a folder of videos (``FOLDER:frame_interval=N``), or such
            files with a dimension of frames.
        geometry: The model's input: ``sample_size``, ``in_channels``, ``num_classes`` and, of videos, ``num_frames``.
        latent: Whether the model lives in an autoencoder's latent space; by default, if it takes neither 1
            nor 3 channels.

    Raises:
        DyditError: for everything that is missing, damaged, or does not fit the model.
    """
    is_latent = geometry.in_channels not in (1, 3) if latent is None else latent
    video, wanted = of_video(geometry), parse_spec(spec)
    packaged = PACKAGED.get(wanted.name)
    path = packaged or Path(wanted.name).expanduser()
    moving = not path.exists() and wanted.name.partition(":")[0] == MOVING
    if not path.exists() and not moving:
        raise DyditError(
            f"There is no data at {spec}.",
            why=f"No file, folder or shipped data set has this name. {did_you_mean(str(spec), (*PACKAGED, MOVING))}".strip(),
            fix=f"Give an existing path, or {' or '.join((*PACKAGED, MOVING))}.",
        )
    if path.is_dir() and is_cache(path):
        return _open_cache(path, geometry)
    if path.is_dir() and video is not None:
        return _open_videos(path, video, is_latent, wanted.frame_interval or 1)
    if wanted.frame_interval is not None:
        raise DyditError(
            f"{wanted.name} has no frame_interval.",
            why="Only a folder of videos, for a model of videos, has frames to choose from.",
            fix=f"Write {wanted.name} alone.",
        )
    if moving:
        return _open_moving_garments(wanted.name, geometry, is_latent)
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


def _open_cache(path: Path, geometry: SampleGeometry) -> DataSplit:
    source = (
        CachedTextSource(path, geometry)
        if isinstance(geometry, TextGeometry)
        else CachedSource(path, geometry)
    )
    return _split_by_hash(source, MirrorRule(source.has_mirror_images), ())


def _open_videos(path: Path, geometry: VideoGeometry, is_latent: bool, frame_interval: int) -> DataSplit:
    if is_idx_folder(path):
        raise DyditError(
            f"{path} holds images, the model takes videos of {geometry.num_frames} frames.",
            why="IDX files hold still images.",
            fix=f"Give {MOVING}{'' if path in PACKAGED.values() else f':{path}'}: videos made from them.",
        )
    folder = VideoFolder(path, geometry, frame_interval)
    if is_latent:
        raise refuse_images_for_latent_model(path, geometry)
    return _split_by_hash(folder, MirrorRule(True), _class_warnings(folder, geometry))


def _open_moving_garments(name: str, geometry: SampleGeometry, is_latent: bool) -> DataSplit:
    video = of_video(geometry)
    if video is None or is_latent:
        model = "latents" if is_latent else "images"
        raise DyditError(
            f"{name} holds videos, the model takes {model}.",
            why="It is made for models of grey videos.",
            fix="Give fashion-mnist-subset instead." if not is_latent else "Use a model of grey videos.",
        )
    given = name.partition(":")[2]
    folder = Path(given).expanduser() if given else PACKAGED["fashion-mnist-subset"]
    if not folder.is_dir():
        raise DyditError(
            f"There is no folder {given}.",
            why=f"{MOVING}:FOLDER makes videos from the IDX files of Fashion-MNIST in FOLDER.",
            fix=f"Give the folder that holds them, or {MOVING} alone for the shipped images.",
        )
    train, rest, known = read_moving_garments(folder, video)
    mirror = MirrorRule(True, frozenset(FASHION_MNIST_NEVER)) if known or not given else MirrorRule(False)
    if rest is not None and len(train) and len(rest):
        return DataSplit(train, rest, "t10k files", mirror)
    return _split_by_hash(train, mirror, ())


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


def _class_warnings(folder: ImageFolder | VideoFolder, geometry: SampleGeometry) -> tuple[str, ...]:
    warnings = []
    present = len(torch.unique(folder.labels))
    if present < geometry.num_classes:
        warnings.append(
            f"{folder.folder} has {present} classes, the model {geometry.num_classes}: label 0 is "
            f"{folder.classes[0]!r}, "
            f"label {present - 1} is {folder.classes[-1]!r}."
        )
    if folder.classes and unpadded_numbers(folder.classes):
        warnings.append(
            f"The class folders of {folder.folder} are sorted as text ('10' before '2'), as in torchvision."
        )
    return tuple(warnings)
