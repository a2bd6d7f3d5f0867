"""An autoencoder folder of the user's, checked against the model before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from dydit_cli.errors import DyditError

CLASS = "AutoencoderKL"
CONFIG_NAME = "config.json"
WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class Vae:
    """A local AutoencoderKL.

    Attributes:
        files: Its configuration and weights.
    """

    files: tuple[Path, ...]
    class_name: str = CLASS

    @property
    def nbytes(self) -> int:
        """Bytes that a copy takes."""
        return sum(file.stat().st_size for file in self.files)

    def copy_to(self, folder: Path) -> None:
        """Copy it, and see that the copy loads.

        Raises:
            DyditError: If its weights are damaged.
        """
        from diffusers import AutoencoderKL

        folder.mkdir()
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        try:
            AutoencoderKL.from_pretrained(str(folder))
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DyditError(
                f"The autoencoder in {self.files[0].parent} cannot be loaded.",
                why=f"A weight file is missing, damaged or does not fit its config.json: {_first_line(error)}",
                fix="Download or copy the folder again.",
            ) from error


def find_vae(path: str | Path, channels: int) -> Vae:
    """Find the autoencoder in a folder, or in the ``vae/`` of a pipeline folder.

    Args:
        path: The folder.
        channels: Channels of the latents that the model draws.

    Raises:
        DyditError: If there is none, it is of another kind, or its latents are not the model's.
    """
    path = Path(path).expanduser()
    folder = next((entry for entry in (path, path / "vae") if (entry / CONFIG_NAME).is_file()), None)
    if folder is None:
        raise DyditError(
            f"There is no autoencoder at {path}.",
            why=f"Neither {CONFIG_NAME} nor vae/{CONFIG_NAME} is there."
            if path.exists()
            else "No such folder exists.",
            fix="Pass a local AutoencoderKL folder, or leave --vae out and pass the autoencoder when the pipeline is loaded.",
        )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        kind, latents = str(config.get("_class_name")), config.get("latent_channels", 4)
    except (OSError, ValueError, AttributeError) as error:
        raise DyditError(
            f"{folder / CONFIG_NAME} cannot be read.",
            why=f"It is not the configuration of a diffusers model ({type(error).__name__}).",
            fix="Download or copy the folder again.",
        ) from error
    if kind != CLASS:
        raise DyditError(
            f"{folder} holds a {kind}, not an {CLASS}.",
            why=f"Its {CONFIG_NAME} says so; DiT's and SiT's latents are those of an {CLASS}.",
            fix=f"Pass an {CLASS} folder.",
        )
    if latents != channels:
        raise DyditError(
            f"The autoencoder's latents have {latents} channels, the model's {channels}.",
            why=f"They would not fit together: {folder / CONFIG_NAME} says latent_channels = {latents}.",
            fix="Pass the autoencoder that the model was trained with."
            if channels not in (1, 3)
            else "Leave --vae out: the model draws pixels and needs no autoencoder.",
        )
    # Variants such as diffusion_pytorch_model.fp16.safetensors stay behind: a pipeline loads the plain files.
    weights = sorted(entry for entry in folder.iterdir() if WEIGHTS.fullmatch(entry.name))
    safe = [entry for entry in weights if ".safetensors" in entry.name]
    if not weights:
        raise DyditError(
            f"The autoencoder in {folder} has no weights.",
            why="There is no diffusion_pytorch_model.safetensors beside its config.json.",
            fix="Download or copy the whole folder.",
        )
    return Vae((folder / CONFIG_NAME, *(safe or weights)))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :200
    ]
