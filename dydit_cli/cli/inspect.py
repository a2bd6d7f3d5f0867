"""`dydit inspect`: what a file or a folder is, and what would become of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit_cli.cli import completing, console, options
from dydit_cli.cli.standing import warn_if_hardly_cheaper

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.artifacts.ancestry import Ancestor
    from dydit_cli.inspection.report import Adapter, Inspection, KeyGroup

EXAMPLES = (
    "dydit inspect DiT-XL-2-256x256.pt",
    "dydit inspect flux1-dev.safetensors --json",
    "dydit inspect runs/trained",
    "dydit inspect my_lora.safetensors",
    "dydit inspect facebook/DiT-XL-2-256",
)

GROUPS_SHOWN = 8
"""Lines of keys of one kind; --json has all."""


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, an adapter, a folder that dydit or diffusers wrote, builtin:NAME, or owner/name of the Hub.",
            metavar="PATH | NAME",
            show_default=False,
            autocompletion=completing.builtin_checkpoints,
        ),
    ],
    num_heads: options.NumHeads = None,
    json: options.AsJson = False,
) -> None:
    """Say what a file or a folder is.

    Family, geometry, format, types, parameters and routers; which keys are used and which would be lost; adapters; the past of an
    artifact; and the command that goes on from here. Reads headers, configurations and manifests, no weights.
    """
    from dydit_cli.checkpoints.builtin import PREFIX, builtin_models, builtin_path
    from dydit_cli.checkpoints.hub import is_repository
    from dydit_cli.checkpoints.locating import glimpsed
    from dydit_cli.families.family import Hints
    from dydit_cli.inspection.inspect import inspect as run

    heads = num_heads
    if path.startswith(PREFIX):
        name = path.removeprefix(PREFIX)
        place, facts = builtin_path(name), builtin_models()[name]
        config = facts.get("config")
        said = config if isinstance(config, dict) else {}
        hints = Hints(heads or said.get("num_heads"), axes_dims_rope=_axes(said))
        found = run(place, hints, named=path, family=str(facts.get("family")))
    elif is_repository(path):
        with glimpsed(path, console.note) as place:
            found = _of_the_hub(run(place, Hints(heads), named=path), str(place), path)
    else:
        found = run(Path(path).expanduser(), Hints(heads))
    if json:
        console.emit_json(found.as_json())
    else:
        console.results().print(table(found))
    for note in found.notes:
        console.note(note)
    if found.routers is not None and found.facts.get("ratio") is not None:
        warn_if_hardly_cheaper(found.facts["ratio"], found.path)
    if found.problem is not None:
        console.warn(found.problem["what"])
        console.note(f"  why: {found.problem['why']}")
        console.note(f"  fix: {found.problem['fix']}")
    elif found.next is not None:
        console.note(f"next: {found.next}")


def _of_the_hub(found: Inspection, place: str, name: str) -> Inspection:
    """What was found in the stand-in of a repository, under the repository's name."""
    return replace(
        found,
        path=found.path.replace(place, name),
        next=None if found.next is None else found.next.replace(place, name),
    )


def _axes(said: dict[str, object]) -> tuple[int, ...] | None:
    axes = said.get("axes_dims_rope")
    return tuple(int(axis) for axis in axes) if isinstance(axes, list) else None


def table(found: Inspection) -> Table:
    """What was found, a line each; what does not apply is left out."""
    from rich.table import Table

    drawn = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    drawn.add_column(style="dim", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, words in rows(found):
        drawn.add_row(name, words)
    return drawn


def rows(found: Inspection) -> list[tuple[str, str]]:
    """Names and words of the lines."""
    lines = [("what", _what(found))]
    if found.families:
        layout = f", {found.layout} layout" if found.layout not in (None, "dydit") else ""
        lines.append(("family", " or ".join(found.families) + layout))
    if found.geometry:
        lines += [("model", _blocks(found)), ("input", _input(found))]
    if found.stored is not None:
        lines += _stored(found)
    if found.parameters:
        lines.append(("parameters", _parameters(found)))
    if found.geometry or found.routers is not None:
        lines.append(("routers", _routers(found)))
    if found.keys is not None:
        lines += _keys(found)
    lines += [("adapter" if place == 0 else "", _adapter(each)) for place, each in enumerate(found.adapters)]
    lines += _facts(found)
    lines += [
        ("made from" if place == 0 else "", _ancestor(each)) for place, each in enumerate(found.lineage)
    ]
    return lines


def _what(found: Inspection) -> str:
    did = f": {found.facts['did']}" if "did" in found.facts else ""
    wrote = f", written by dydit {found.stage}{did}" if found.stage else ""
    if found.kind == "artifact":
        return f"{'a dynamic' if found.routers is not None else 'a pruned'} model{wrote}"
    if found.kind == "pipeline" and found.routers is not None:
        return f"a pipeline's folder with a dynamic model{wrote}"
    if found.kind == "results":
        return f"results of dydit {found.stage}"
    if found.kind == "checkpoint" and found.routers is not None:
        return "a dynamic checkpoint of the paper's authors"
    return {
        "checkpoint": "a static checkpoint" if found.families else "a checkpoint",
        "pipeline": "a pipeline's folder with a static model",
        "adapter": "an adapter",
        "scores": "importance scores",
    }.get(found.kind, f"an {found.kind}")


def _blocks(found: Inspection) -> str:
    geometry = found.geometry
    double = geometry.get("num_double")
    blocks = f"{geometry['depth']}" if double is None else f"{double} + {geometry['depth'] - double}"
    return (
        f"{blocks} blocks of {geometry['hidden_size']} channels, {geometry['num_heads']} heads, "
        f"{geometry['num_groups']} channel groups"
    )


def _input(found: Inspection) -> str:
    geometry = found.geometry
    frames = f"{geometry['num_frames']} frames of " if geometry.get("num_frames") else ""
    said = (
        f"{geometry['text_tokens']} tokens of text"
        if geometry.get("text_tokens")
        else f"{geometry['num_classes']} classes"
    )
    return (
        f"{frames}{geometry['in_channels']} x {geometry['sample_size']} x {geometry['sample_size']}, "
        f"patches of {geometry['patch_size']}, {geometry['num_tokens']:,} tokens, {said}"
    )


def _stored(found: Inspection) -> list[tuple[str, str]]:
    stored = found.stored
    if stored is None:
        return []
    files = "1 file" if stored.files == 1 else f"{stored.files} files"
    copy = f", the copy '{stored.copy}' of it" if stored.copy else ""
    lines = [("format", f"{stored.container}, {files}, {size(stored.nbytes)}{copy}")]
    total = sum(stored.dtypes.values())
    if total:
        types = [
            name if count == total else f"{name} {count / total:.1%}" for name, count in stored.dtypes.items()
        ]
        kind = f" (stored as {stored.quantisation})" if stored.quantisation else ""
        lines.append(("types", ", ".join(types) + kind))
    lines += _groups("beside it", stored.beside)
    return lines


def _parameters(found: Inspection) -> str:
    params = found.parameters
    if found.routers is not None:
        share = params["routers"] / max(1, params["static"])
        return f"{params['static']:,} + {params['routers']:,} of routers ({share:.2%})"
    if found.layout == "dydit":
        return f"{params['static']:,}"
    return f"{params['static']:,}; conversion adds {params['routers']:,} of routers"


def _routers(found: Inspection) -> str:
    routers = found.routers
    if routers is None:
        return "none: a static model" if found.layout != "dydit" else "none: a pruned model, which is static"
    if routers.baked_steps is not None:
        return f"of tokens alone; widths are baked for {routers.baked_steps} steps"
    whose = "of the paper's authors, " if routers.origin == "authors" else ""
    first = "most important unit always on" if routers.always_on else "no unit always on"
    told = (
        f", trained for ratios of {routers.budgets[0]:g} to {routers.budgets[1]:g}" if routers.budgets else ""
    )
    return f"{whose}{routers.width} width, {first}{told}"


def _keys(found: Inspection) -> list[tuple[str, str]]:
    keys = found.keys
    if keys is None:
        return []
    whole = "all used" if not keys.lost else f"{keys.recognised} used"
    lines = [("keys", f"{keys.total} in it, {whole}" + (", none missing" if not keys.missing else ""))]
    return lines + _groups("lost", keys.lost) + _groups("missing", keys.missing)


def _groups(name: str, groups: tuple[KeyGroup, ...]) -> list[tuple[str, str]]:
    lines = [
        (
            name if place == 0 else "",
            f"{group.pattern}" + (f"  x {group.count}" if group.count > 1 else "") + f"  ({group.why})",
        )
        for place, group in enumerate(groups[:GROUPS_SHOWN])
    ]
    if len(groups) > GROUPS_SHOWN:
        rest = sum(group.count for group in groups[GROUPS_SHOWN:])
        lines.append(("", f"and {rest} more"))
    return lines


def _adapter(adapter: Adapter) -> str:
    rank = f"rank {adapter.rank}" if adapter.rank is not None else "of several ranks"
    experts = f", {adapter.experts} experts" if adapter.experts else ""
    return (
        f"{adapter.kind}, {rank}{experts}, {adapter.layers} layers, {adapter.parameters:,} parameters, "
        f"keys of {adapter.names} ({adapter.path})"
    )


def _facts(found: Inspection) -> list[tuple[str, str]]:
    facts = found.facts
    lines = []
    if "ratio" in facts:
        target = f", target {facts['target_ratio']:g}" if "target_ratio" in facts else ""
        lines.append(("ratio", f"{facts['ratio']:.4f} of attention and MLP MACs{target}"))
    if "checkpoints" in facts:
        lines.append(("checkpoints", ", ".join(facts["checkpoints"]) or "none"))
    if "versions" in facts:
        versions = facts["versions"]
        made = ", ".join(
            f"{name} {versions[name]}" for name in ("dydit", "torch", "diffusers") if name in versions
        )
        lines.append(("made with", made))
    return lines


def _ancestor(ancestor: Ancestor) -> str:
    words = f": {ancestor.words}" if ancestor.words else ""
    state = {
        "present": "",
        "gone": " (no longer there)",
        "changed": " (its weights have changed since)",
    }[ancestor.state]
    return f"{ancestor.stage}{words}, {ancestor.path}{state}"


def size(count: float) -> str:
    """Bytes in the unit of disks and hubs: powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
