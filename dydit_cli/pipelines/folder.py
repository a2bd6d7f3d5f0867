"""A local pipeline folder: what it must hold, and where."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli.errors import DyditError, did_you_mean

INDEX = "model_index.json"
PREFIX = "builtin:"
BUILTIN = Path(__file__).parent.parent / "assets" / "pipelines"
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline on disk. Nothing of it is loaded yet.

    Attributes:
        path: The folder.
        index: Its ``model_index.json``.
    """

    path: Path
    index: dict[str, Any]

    def part(self, name: str) -> Path:
        """The folder of a component.

        Raises:
            DyditError: if it is not there.
        """
        folder = self.path / name
        if not folder.is_dir():
            raise DyditError(
                f"The pipeline in {self.path} has no {name}.",
                why=f"Its folder {name}/ is missing; it is a {self.index.get('_class_name', 'pipeline')}.",
                fix="Give the folder of a whole FLUX pipeline, for example of FLUX.1-dev as diffusers saves it.",
            )
        return folder

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration.

        Raises:
            DyditError: if it is missing or damaged.
        """
        path = self.part(name) / file
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DyditError(
                f"{path} cannot be read.",
                why=f"It is no readable JSON ({type(error).__name__}).",
                fix="Copy the pipeline's folder again.",
            ) from error
        return content


def open_pipeline(given: str | Path) -> PipelineFolder:
    """Find a pipeline folder, or a shipped one called ``builtin:NAME``, and see that it has text encoders.

    Raises:
        DyditError: if there is none, or it is another kind of pipeline.
    """
    path = _builtin(str(given)) if str(given).startswith(PREFIX) else Path(given).expanduser()
    index = path / INDEX
    if not index.is_file():
        raise DyditError(
            f"There is no pipeline at {path}.",
            why=f"It has no {INDEX}." if path.is_dir() else "No such folder exists.",
            fix="Give the local folder of a diffusers FLUX pipeline: text encoders, tokenizers and vae.",
        )
    try:
        content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DyditError(
            f"{index} cannot be read.",
            why=f"It is no readable JSON ({type(error).__name__}).",
            fix="Copy the pipeline's folder again.",
        ) from error
    folder = PipelineFolder(path, content)
    for name in TEXT_PARTS:
        folder.part(name)
    return folder


def _builtin(given: str) -> Path:
    name = given.removeprefix(PREFIX)
    known = sorted(entry.name for entry in BUILTIN.iterdir() if entry.is_dir()) if BUILTIN.is_dir() else []
    if name in known:
        return BUILTIN / name
    raise DyditError(
        f"There is no shipped pipeline called '{name}'.",
        why=f"The package holds {', '.join(PREFIX + entry for entry in known) or 'none'}.",
        fix=did_you_mean(name, known) or "Give the folder of a pipeline.",
    )
