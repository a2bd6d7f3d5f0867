"""What a text-to-image run is conditioned on: prompts through a local pipeline's encoders, or a prepared cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dydit_cli.data.cache import CachedTexts, TextShape, is_cache, read_index
from dydit_cli.data.cached_text import GUIDANCE, TextGeometry, check_text
from dydit_cli.errors import DyditError
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.pipelines.folder import PipelineFolder, open_pipeline
from dydit_cli.pipelines.text import TextEncoders

OR = "|"
MOST_CACHED = 64
"""Texts taken from a cache, evenly over it: a cache may hold millions."""


@dataclass(frozen=True)
class TextRequest:
    """Where prompts come from.

    Attributes:
        prompt: A prompt, or several separated by ``|``.
        prompts: A file of prompts, one a line.
        pipeline: A local pipeline folder, whose text encoders read them.
        cache: A prepared cache, in place of all of them.
    """

    prompt: str | None = None
    prompts: str | Path | None = None
    pipeline: str | Path | None = None
    cache: str | Path | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return (self.prompt, self.prompts, self.pipeline, self.cache) == (None, None, None, None)

    def check(self) -> PipelineFolder | None:
        """See that it can be met, before anything large is loaded; the pipeline, if there is one.

        Raises:
            DyditError: If it cannot.
        """
        folder = open_pipeline(self.pipeline) if self.pipeline is not None else None
        asked = self.prompt is not None or self.prompts is not None
        if asked and folder is None:
            raise DyditError(
                "Prompts need text encoders.",
                why="The model's folder holds the transformer alone.",
                fix="Pass --pipeline FOLDER, a local FLUX pipeline, or --cache with prepared conditions in place of prompts.",
            )
        if not asked and self.cache is None:
            raise DyditError(
                "There is nothing to draw.",
                why="A text-to-image model needs prompts.",
                fix='Pass --prompt "a sneaker" --pipeline FOLDER, --prompts FILE, or --cache FOLDER.',
            )
        if asked and self.cache is not None:
            raise DyditError(
                "Prompts and a cache are given.",
                why="A cache holds conditions in place of prompts.",
                fix="Leave one of them out.",
            )
        if self.cache is not None and not is_cache(Path(self.cache).expanduser()):
            raise DyditError(
                f"There is no cache at {self.cache}.",
                why="It has no cache.json.",
                fix="Give a folder that `dydit prepare` wrote.",
            )
        return folder

    def texts(self) -> list[str]:
        """The prompts, in the order in which images take them in turn.

        Raises:
            DyditError: If a file cannot be read or holds none.
        """
        given = [part.strip() for part in (self.prompt or "").split(OR) if part.strip()]
        if self.prompts is None:
            return given
        path = Path(self.prompts).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DyditError(
                f"The prompts in {path} cannot be read.",
                why=f"{error}.",
                fix="Give a text file in UTF-8 with one prompt a line.",
            ) from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise DyditError(
                f"{path} holds no prompts.", why="Every line of it is empty.", fix="Write one prompt a line."
            )
        return given + found


@dataclass(frozen=True)
class Prompted:
    """Conditions that are ready.

    Attributes:
        prompts: What they say.
        condition: One a prompt, on the CPU.
    """

    prompts: tuple[str, ...]
    condition: TextCondition


def conditions_for(
    request: TextRequest,
    geometry: TextGeometry,
    *,
    guidance: float | None,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Prompted:
    """Read or encode what is asked for.

    Args:
        request: Checked before.
        geometry: Of the model, which the embeddings must fit.
        guidance: Strength of distilled guidance; 3.5 if not given. Models without one refuse another.
        device: Where text encoders run.
        dtype: What they run in.
        on_progress: Told how far it is.

    Raises:
        DyditError: If embeddings do not fit the model, or guidance is given to one that takes none.
    """
    if guidance is not None and not geometry.guidance:
        raise DyditError(
            "The model takes no guidance.",
            why="Its guidance was not distilled into an input (FLUX.1-schnell and the shipped model are such).",
            fix="Leave out --guidance.",
        )
    strength = (GUIDANCE if guidance is None else guidance) if geometry.guidance else None
    if request.cache is not None:
        folder = Path(request.cache).expanduser()
        texts = CachedTexts(folder, read_index(folder))
        shape = texts.index.text
        if shape is None:
            raise DyditError(
                f"The cache in {folder} holds class labels.",
                why="It was prepared for a class-conditional model.",
                fix="Give a cache with texts.",
            )
        check_text(shape, geometry, folder)
        count = len(texts.prompts)
        chosen = [place * count // min(count, MOST_CACHED) for place in range(min(count, MOST_CACHED))]
        prompts = tuple(texts.prompts[number] for number in chosen)
        return Prompted(prompts, texts.conditions(chosen, strength))
    pipeline = open_pipeline(str(request.pipeline))
    given = request.texts()
    encoded = TextEncoders(pipeline, device, dtype).encode(given, on_progress)
    found = TextShape(encoded.prompt_embeds.shape[1], encoded.prompt_embeds.shape[2], encoded.pooled.shape[1])
    check_text(found, geometry, pipeline.path)
    levels = None if strength is None else torch.full((len(given),), strength)
    return Prompted(tuple(given), replace(encoded, guidance=levels))
