"""What the shell offers for a half-written word: names that dydit knows, without importing torch.

What a key can be stands in the schema, and is taken from there. Families and published sizes stand in rooms that import torch, so
their names are repeated here; a test compares them. Where a path may follow as well, nothing is offered for an empty word: the
shell then offers its files.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from dydit_cli.cli.stage import STAGES

VARIABLE = "_DYDIT_COMPLETE"
"""Set by the shell's completion; names the shell."""

FAMILIES = ("dit", "sit", "latte", "latte-t2v", "flux")
VIDEO_SETS = ("ucf101", "ffs", "sky", "taichi")
FLUX_SIZES = ("dev", "schnell", "lite", "mini")
BUILTIN = "builtin:"
MODELS = Path(__file__).parent.parent / "assets" / "models"
SHIPPED_DATA = ("fashion-mnist-subset", "moving-fashion-mnist")
DEVICES = ("auto", "cpu", "cuda", "mps")
OWN = {
    "family": ("auto", *FAMILIES),
    "device": DEVICES,
    "width": ("free", "ordered"),
    "importance": ("auto", "magnitude", "taylor", "random"),
    "routers": ("learned", "width", "tokens", "random"),
    "data": SHIPPED_DATA,
    "calibrate": SHIPPED_DATA,
    "reference": ("fashion-mnist",),
    "extractor": ("auto", "fashion-mnist"),
    "against": ("static",),
    "video_formats": ("mp4", "gif", "frames", "grid"),
    "trackers": ("jsonl", "tensorboard", "wandb"),
}
"""Keys whose names the schema does not list, because a path or a plug-in's name may stand there too."""

BREAKS = re.compile(r"[:=]+")

Complete = Callable[[typer.Context, str], list[str]]


def choices(key: str) -> Complete:
    """Return what completes the option of a key of the command's section.

    Args:
        key: As the schema calls it; or ``preset``, ``builtin``, ``pipeline``.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        names = _names(str(ctx.info_name), key)
        return starting(names, incomplete)

    return complete


def among(*names: str) -> Complete:
    """Return what completes an option that takes one of ``names``."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        return starting(names, incomplete)

    return complete


def recipes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete the arguments of a stage: a built-in recipe, then ``key=value``."""
    from dydit_cli.recipe.builtin import builtin_recipes

    found = starting([recipe.name for recipe in builtin_recipes()], incomplete)
    stage = str(ctx.info_name)
    if incomplete and stage in STAGES:
        found += _overrides(stage, incomplete)
    return found


def recipe_names(incomplete: str) -> list[str]:
    """Complete the name of a built-in recipe."""
    from dydit_cli.recipe.builtin import builtin_recipes

    return starting([recipe.name for recipe in builtin_recipes()], incomplete)


def builtin_checkpoints(incomplete: str) -> list[str]:
    """Complete ``builtin:NAME``."""
    return starting([BUILTIN + name for name in shipped_models()], incomplete) if incomplete else []


def shipped_models() -> list[str]:
    """Names of the shipped models, from their file of facts: the room that reads models imports torch."""
    facts = json.loads((MODELS / "models.json").read_text(encoding="utf-8"))
    return [Path(name).stem for name in facts if Path(name).suffix]


def presets() -> list[str]:
    """Names of all published sizes, as the registry has them."""
    names = []
    for size in ("s", "b", "l", "xl"):
        for patch in (2, 4, 8):
            names += [
                f"{family}-{size}/{patch}{suffix}" for family in ("dit", "sit") for suffix in ("", "-512")
            ]
            names += [f"latte-{size}/{patch}{suffix}" for suffix in ("", "-unconditional")]
    names += [f"latte-xl/2-{name}" for name in VIDEO_SETS]
    return [*names, "latte-t2v-1", *(f"flux-{size}" for size in FLUX_SIZES)]


def starting(names: tuple[str, ...] | list[str], incomplete: str) -> list[str]:
    """Those of the names that begin with what is written."""
    return [name for name in names if name.startswith(incomplete)]


def _names(stage: str, key: str) -> tuple[str, ...] | list[str]:
    if key == "preset":
        return presets()
    if key in OWN:
        return OWN[key]
    from dydit_cli.recipe.schema import SECTIONS

    return _literals(SECTIONS[stage].model_fields[key].annotation)


def _literals(annotation: Any) -> list[str]:
    """The words that an annotation allows; none of a number or a text."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _literals(part)]


def _overrides(stage: str, incomplete: str) -> list[str]:
    """``key=`` and, where it is known what may follow, ``key=value``."""
    from dydit_cli.recipe.schema import SECTIONS

    found = []
    for key, field in SECTIONS[stage].model_fields.items():
        if not f"{key}=".startswith(incomplete.partition("=")[0]):
            continue
        words = list(OWN.get(key) or _literals(field.annotation))
        if not words and field.annotation is bool:
            words = ["true", "false"]
        # The default beside the bare key keeps the shell from putting a space behind the sign.
        default = [] if field.is_required() or field.default is None else [str(field.default)]
        found += [f"{key}={word}" for word in (words or ["", *default])]
    return starting(found, incomplete)


@contextmanager
def whole_words(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Let bash complete ``builtin:NAME`` and ``key=value``, which it takes for several words.

    The words are put together before they are completed, and of what is offered only the part after the last sign that bash broke
    at is printed: that is the part which bash replaces.

    Args:
        environment: Of the process; changed.
    """
    if environment.get(VARIABLE) != "complete_bash" or "COMP_WORDS" not in environment:
        yield
        return
    words, place = joined(environment["COMP_WORDS"].split("\n"), int(environment.get("COMP_CWORD", "0")))
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(words), str(place)
    word = words[place] if place < len(words) else ""
    breaks = list(BREAKS.finditer(word))
    fixed = word[: breaks[-1].end()] if breaks else ""
    caught = io.StringIO()
    try:
        with redirect_stdout(caught):
            yield
    finally:
        sys.stdout.writelines(f"{line.removeprefix(fixed)}\n" for line in caught.getvalue().splitlines())


def joined(words: list[str], place: int) -> tuple[list[str], int]:
    """Put words together that bash broke at ``:`` and ``=``.

    Args:
        words: As bash has them.
        place: Of the one that is completed.

    Returns:
        The words as they were written, and the place among them.
    """
    whole: list[str] = []
    glued, at = False, place
    for index, word in enumerate(words):
        sign = BREAKS.fullmatch(word) is not None
        if whole and (sign or glued) and index > 1:
            whole[-1] += word
        else:
            whole.append(word)
        glued = sign
        if index == place:
            at = len(whole) - 1
    return whole, at
