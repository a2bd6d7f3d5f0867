"""A static model of one timestep's width: heads and channel groups that are off there are cut out for good, every token runs.

The same blocks, layout and loading as `dydit convert --prune`, with the units that the routers keep instead of a ranking's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dydit_cli.dynamic.gates import ImposedGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import DenseExecutor
from dydit_cli.export.flat import is_order, is_router
from dydit_cli.export.format import Format
from dydit_cli.export.pipeline_format import Opened, Told, check_folder, nbytes_of, open_model, write_folder
from dydit_cli.export.refusals import refuse_baked, refuse_following_timestep, refuse_measured
from dydit_cli.export.report import ExportReport, Progress, Source
from dydit_cli.export.sizes import megabytes
from dydit_cli.export.verify import TIMESTEPS, judged, shipped
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.cutting import cut_model
from dydit_cli.families.family import ObjectiveKind
from dydit_cli.families.registry import family_of
from dydit_cli.flops import executed_ratio
from dydit_cli.randomness import normal
from dydit_cli.recipe.schema import ExportSection

LAST_TIMESTEP = {"diffusion": 999.0, "flow": 1.0}
"""By kind of model; the first is 0."""

PRUNED = "The static {title} that a dynamic one is at the timestep {t}, all tokens on, written by {maker}."
LIMITS = """It is static: the heads and channels that the routers of the dynamic model switch off at the timestep {t} were cut out for good,
and what is left runs at every timestep, for every token: {ratio} of the attention and MLP multiplications of the complete model. It was
trained to be that small at the timestep {t}; how well it does at others was not measured.

| block | heads | hidden channels |
| --- | --- | --- |
{rows}
"""


def check_pruned(source: Source, settings: ExportSection) -> None:
    """Refuse what has no one width at a timestep.

    Raises:
        DyditError: For everything that can be known without the weights.
    """
    refuse_baked(source)
    refuse_following_timestep(source, settings)
    refuse_measured(settings)
    _timestep(settings.timestep, source.family.objective)
    if source.config.get("block_heads") is not None:
        raise DyditError(
            "This model is pruned already.",
            why="Its blocks have one width at all timesteps.",
            fix="Pass --format diffusers.",
        )
    check_folder(source, settings)


def write_pruned(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write a pipeline folder of a pruned model, load it with its own code and compare.

    Raises:
        DyditError: For everything that a user can put right.
    """
    t = _timestep(settings.timestep, source.family.objective)
    opened = open_model(source, settings, say)
    dynamic = opened.model
    if not isinstance(dynamic, DynamicTransformer):
        raise TypeError(type(dynamic).__name__)
    before = nbytes_of(dynamic)
    dynamic.float()
    routing = dynamic.routing(t)
    written = cut_at(dynamic, routing, getattr(torch, opened.dtype))
    ratio = f"{float(executed_ratio(routing, dynamic.geometry)):.3f}"
    heads, hidden = (written.config[name] for name in ("block_heads", "block_hidden"))
    size = f"{megabytes(nbytes_of(written))}, against {megabytes(before)} of the dynamic model"
    say(size)
    rows = "\n".join(
        f"| {block} | {count} of {dynamic.geometry.num_heads} | {channels} of {dynamic.geometry.mlp_hidden} |"
        for block, (count, channels) in enumerate(zip(heads, hidden, strict=True))
    )
    return write_folder(
        source,
        settings,
        Opened(written, opened.dtype, opened.vae),
        folder,
        say,
        compare=lambda transformer, code: pruned_difference(dynamic, routing, t, transformer, code),
        told=Told(
            introduction=PRUNED.replace("{t}", f"{t:g}"),
            dials=False,
            limits=LIMITS.format(t=f"{t:g}", ratio=ratio, rows=rows),
            notes=(
                f"It has the width of the timestep {t:g} at all timesteps, and no routers; how well it draws was not measured.",
            ),
            facts={
                "timestep": f"{t:g}",
                "width": f"{ratio} of attention and MLP, all tokens",
                "heads": f"{' '.join(map(str, heads))} of {dynamic.geometry.num_heads} a block",
                "channels": f"{' '.join(map(str, hidden))} of {dynamic.geometry.mlp_hidden} a block",
                "size": size,
            },
            verified=lambda difference: (
                f"Loaded with its own code, it differs from the dynamic model with the widths of that timestep and all tokens on by at "
                f"most {difference:.1e}."
            ),
        ),
    )


@torch.no_grad()
def cut_at(model: DynamicTransformer, routing: Routing, dtype: torch.dtype) -> DynamicTransformer:
    """The static model of the units that ``routing`` (of one sample) has on, its weights in a type.

    Raises:
        DyditError: If a block would be left without any.
    """
    heads, channels = [], []
    for index, (block, kept) in enumerate(zip(model.dynamic_blocks, routing.blocks, strict=True)):
        of_attention = block.attn.by_source(kept.heads)[0].nonzero().flatten()
        of_mlp = block.mlp.by_source(kept.groups)[0].nonzero().flatten()
        if not len(of_attention) or not len(of_mlp):
            raise DyditError(
                f"Block {index} runs no {'head' if len(of_mlp) else 'channel group'} at this timestep.",
                why="A static block needs at least one of either.",
                fix="Choose another --timestep, or pass --format baked.",
            )
        heads.append(of_attention)
        channels.append(of_mlp)
    routers = {"width": "free", "budgets": None, "default_budget": None}
    config = {name: value for name, value in model.config.items() if not name.startswith("_")} | routers
    tensors = {
        key: tensor.to(dtype)
        for key, tensor in model.state_dict().items()
        if not (is_router(key) or is_order(key))
    }
    pruned = cut_model(type(model), config, tensors, heads, channels)
    if not isinstance(pruned, DynamicTransformer):
        raise TypeError(type(pruned).__name__)
    return pruned


@torch.no_grad()
def pruned_difference(
    source: DynamicTransformer, routing: Routing, t: float, transformer: Path, code: Path
) -> float:
    """Load a pruned transformer with its shipped code and compare it with the dynamic model's widths, all tokens on.

    Args:
        source: The dynamic model, with the weights as written, in fp32.
        routing: What it runs at ``t``; all tokens.
        t: The timestep, in the family's own convention. Two more noise levels are compared, with the widths of this one.
        transformer: The exported folder.
        code: The shipped file.

    Returns:
        The largest absolute difference.

    Raises:
        DyditError: If it is more than rounding.
    """
    flow = family_of(source).objective == "flow"
    times = torch.tensor([t, *((1 - each / 1000 if flow else each) for each in TIMESTEPS)])
    noise = normal(0, (len(times), *source.geometry.sample_shape), "export")
    labels = torch.arange(len(times)) % max(1, source.geometry.num_classes)
    imposed = ImposedGating(routing.map(lambda mask: mask.expand(len(times), -1)))
    expected, _ = source.denoise(noise, times, labels, executor=DenseExecutor(), gating=imposed)
    with shipped(code) as module:
        native = getattr(module, type(source).__name__)
        reloaded = native.from_pretrained(str(transformer), torch_dtype=torch.float32)
        found = reloaded(noise, times, labels, return_dict=False)[0]
    return judged(found, expected)


def _timestep(given: float | None, objective: ObjectiveKind) -> float:
    """The timestep whose width stays.

    Raises:
        DyditError: If none was given, or one that the family does not have.
    """
    last = LAST_TIMESTEP[objective]
    noise = "0 is noise" if objective == "flow" else "999 is noise"
    if given is None:
        raise DyditError(
            "The pruned format needs a timestep.",
            why="A dynamic model has another width at each, and a static one has one.",
            fix=f"Pass --timestep T, from 0 to {last:g} ({noise}); `dydit profile` shows the width at each.",
        )
    if given > last:
        raise DyditError(
            f"There is no timestep {given:g}.",
            why=f"This family counts from 0 to {last:g} ({noise}).",
            fix="Pass one of these with --timestep.",
        )
    return float(given)


PRUNED_FORMAT = Format(
    name="pruned",
    summary="the static model of one timestep's width",
    families=("dit", "sit"),
    check=check_pruned,
    write=write_pruned,
    options=frozenset({"timestep"}),
    instead="Blocks of a width of their own are written for DiT and SiT; pass --format diffusers, or --format baked for a Latte.",
)
