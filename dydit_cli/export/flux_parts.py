"""What a FLUX pipeline has beside its transformer: text encoders, tokenizers, autoencoder and schedule, from a local folder."""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import write_json
from dydit_cli.errors import DyditError
from dydit_cli.export.registration import MODULE
from dydit_cli.export.vae import WEIGHTS, Vae, find_vae
from dydit_cli.families.flux_geometry import FluxGeometry
from dydit_cli.pipelines.autoencoder import autoencoder_config
from dydit_cli.pipelines.folder import TEXT_PARTS, PipelineFolder, open_pipeline

PATCHES = "PatchAutoencoder"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
LIBRARIES = ("transformers", "diffusers")
OTHER_FORMATS = (".bin", ".msgpack", ".h5", ".onnx", ".ckpt", ".pt")
"""The same weights once more, beside safetensors."""
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)[.-]")
"""The same weights once more, in another type; a pipeline loads the plain files."""
USUAL_REDUCTION = 8

SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
GUIDED: Mapping[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}
UNGUIDED: Mapping[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False}


@dataclass(frozen=True)
class FluxParts:
    """The parts of a pipeline, none of which is loaded.

    Attributes:
        schedule: The scheduler's configuration.
        text: Name of a text part -> its entry in ``model_index.json`` and the files of its folder; empty without a pipeline.
        vae: The autoencoder, if there is one.
        patches: Whether that is the rearrangement of pixels, whose code goes with it.
        reduction: Pixels to a latent pixel, on a side.
        pipeline_class: The pipeline that the parts come from, if any.
    """

    schedule: Mapping[str, Any]
    text: Mapping[str, tuple[list[str], tuple[Path, ...]]]
    vae: Vae | None
    patches: bool
    reduction: int
    pipeline_class: str | None

    @property
    def missing(self) -> list[str]:
        """Parts that must be passed when the pipeline is loaded."""
        return [*(name for name in TEXT_PARTS if name not in self.text), *([] if self.vae else ["vae"])]

    @property
    def nbytes(self) -> int:
        """Bytes that a copy takes."""
        files = [file for _, files in self.text.values() for file in files]
        return sum(file.stat().st_size for file in files) + (self.vae.nbytes if self.vae else 0)

    def copy_to(self, folder: Path, code: str) -> dict[str, list[str | None]]:
        """Copy all that is there into a pipeline folder, and see that the copies are whole.

        Args:
            folder: The pipeline's.
            code: The file that a part with a class of ours needs.

        Returns:
            The parts' entries in ``model_index.json``.

        Raises:
            DyditError: If a part is damaged.
        """
        index: dict[str, list[str | None]] = {"scheduler": ["diffusers", SCHEDULER]}
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", dict(self.schedule))
        for name in TEXT_PARTS:
            entry, files = self.text.get(name, ([None, None], ()))
            index[name] = list(entry)
            if files:
                _copy(files, folder / name)
        if self.vae is None:
            index["vae"] = [None, None]
        elif self.patches:
            _copy(self.vae.files, folder / "vae")
            (folder / "vae" / f"{MODULE}.py").write_text(code, encoding="utf-8")
            index["vae"] = [MODULE, PATCHES]
        else:
            self.vae.copy_to(folder / "vae")
            index["vae"] = ["diffusers", self.vae.class_name]
        return index


def find_parts(pipeline: str | None, vae: str | None, geometry: FluxGeometry) -> FluxParts:
    """Find the parts of a pipeline and check them against the model, before anything is written.

    Args:
        pipeline: A local pipeline folder or ``builtin:NAME``; None for no text parts and FLUX's own schedule.
        vae: A local autoencoder folder, in place of the pipeline's.
        geometry: Of the model.

    Raises:
        DyditError: If parts are missing, are not what a FLUX needs, or do not fit the model.
    """
    given = open_pipeline(pipeline) if pipeline is not None else None
    schedule = {"_class_name": SCHEDULER, **SCHEDULE, **(GUIDED if geometry.guidance else UNGUIDED)}
    text: dict[str, tuple[list[str], tuple[Path, ...]]] = {}
    if given is not None:
        schedule = _schedule(given)
        _check_widths(given, geometry)
        text = {name: (_entry(given, name), _files(given.part(name))) for name in TEXT_PARTS}
    place = vae or (str(given.path) if given is not None and (given.path / "vae").is_dir() else None)
    found, patches, reduction = None, False, USUAL_REDUCTION
    if place is not None:
        found, patches, reduction = _autoencoder(place, geometry.in_channels)
    name = str(given.index.get("_class_name")) if given is not None else None
    return FluxParts(schedule, text, found, patches, reduction, name)


def _autoencoder(place: str, channels: int) -> tuple[Vae, bool, int]:
    folder, config = autoencoder_config(Path(place).expanduser())
    reduction = 2 ** (len(config.get("block_out_channels", ())) - 1)
    if config["_class_name"] != PATCHES:
        return find_vae(folder, channels), False, int(reduction)
    if config.get("latent_channels") != channels:
        raise DyditError(
            f"The autoencoder's latents have {config.get('latent_channels')} channels, the model's {channels}.",
            why=f"They would not fit together: {folder / 'config.json'} says so.",
            fix="Pass the autoencoder that the model was trained with.",
        )
    files = tuple(file for file in sorted(folder.iterdir()) if WEIGHTS.fullmatch(file.name))
    return Vae((folder / "config.json", *files), PATCHES), True, int(reduction)


def _schedule(pipeline: PipelineFolder) -> dict[str, Any]:
    config = pipeline.config("scheduler", "scheduler_config.json")
    if config.get("_class_name") != SCHEDULER:
        raise DyditError(
            f"The pipeline's scheduler is a {config.get('_class_name')}.",
            why=f"FLUX is sampled with diffusers' {SCHEDULER}.",
            fix="Pass the folder of a FLUX pipeline.",
        )
    return config


def _check_widths(pipeline: PipelineFolder, geometry: FluxGeometry) -> None:
    """The embeddings that the encoders give are those that the model takes."""
    # T5 calls its width d_model; CLIP gives a projection only where its class does.
    widths = {
        "text_encoder_2": (pipeline.config("text_encoder_2").get("d_model"), geometry.joint_size),
        "text_encoder": (pipeline.config("text_encoder").get("hidden_size"), geometry.pooled_size),
    }
    for name, (given, wanted) in widths.items():
        if given is not None and given != wanted:
            raise DyditError(
                f"The pipeline's {name} gives embeddings of {given} channels, the model takes {wanted}.",
                why=f"{pipeline.part(name) / 'config.json'} says so.",
                fix="Pass the pipeline of the model that was converted.",
            )


def _entry(pipeline: PipelineFolder, name: str) -> list[str]:
    entry = pipeline.index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and entry[0] in LIBRARIES and isinstance(entry[1], str):
        return [str(entry[0]), str(entry[1])]
    raise DyditError(
        f"The pipeline's {name} is no part that diffusers loads by itself.",
        why=f"Its model_index.json names {entry}; a class of {' or '.join(LIBRARIES)} is expected.",
        fix="Pass the folder of a FLUX pipeline as diffusers saves it.",
    )


def _files(folder: Path) -> tuple[Path, ...]:
    """What a part needs: no second copy of its weights in another type or format, and no code."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    files = [file for file in files if file.suffix != ".py" and not VARIANT.search(file.name)]
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if not set(file.suffixes) & set(OTHER_FORMATS)]
    elif any(set(file.suffixes) & set(OTHER_FORMATS) for file in files):
        raise DyditError(
            f"{folder} has no safetensors weights.",
            why="Other formats can run code when they are loaded, and are not copied.",
            fix="Load the pipeline with diffusers and save it with safe_serialization=True.",
        )
    return tuple(files)


def _copy(files: tuple[Path, ...], folder: Path) -> None:
    folder.mkdir()
    for file in files:
        copy = folder / file.name
        shutil.copyfile(file, copy)
        if not filecmp.cmp(file, copy, shallow=False):
            raise DyditError(
                f"{file} was not copied whole.",
                why="Reading the copy back gave other bytes: the disk is faulty, or the file was being changed.",
                fix="Export again; nothing was left behind.",
            )
