"""The baked schedule: a pipeline folder whose widths are written down for a known list of timesteps.

The width routers go. What each timestep runs is a row of masks over one copy of the weights (`dynamic/baked.py`); executors, plans
and slices are those of a dynamic model, and so are the routers of tokens, which depend on the image.

The adaLN values are not written down. A table of them has (6L + 2)C numbers for each pair of timestep and label, the layers that
compute them C + 1 times as many: with classes and guidance the table is the larger of the two as soon as steps times labels are
more than C, and a plan makes it anyway when sampling begins (`execution/modulation.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.export.format import Format
from dydit_cli.export.pipeline import pipeline_model
from dydit_cli.export.pipeline_format import Opened, Told, check_folder, nbytes_of, open_model, write_folder
from dydit_cli.export.refusals import refuse_baked
from dydit_cli.export.report import ExportReport, Progress, Source
from dydit_cli.export.schedule import Schedule, schedule_of
from dydit_cli.export.sizes import megabytes
from dydit_cli.export.skeleton import skeleton
from dydit_cli.export.verify import judged, shipped
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_of
from dydit_cli.flops import executed_ratio
from dydit_cli.randomness import normal
from dydit_cli.recipe.schema import ExportSection

WIDTH_ROUTERS = (".head_router.", ".channel_router.")
BAKED = (
    "A {title} whose width follows a schedule of {steps} sampling steps, written down, and whose tokens depend on the image\n"
    '("Dynamic Diffusion Transformer", [arXiv 2410.03456](https://arxiv.org/abs/2410.03456)), made by {maker}.'
)
LIMITS = """
### What it cannot do

Its width routers are gone: what each timestep runs stands in a table. So

- it serves {steps} steps: {schedules}. Another timestep is an error that names these; the complete model (`"static"`) runs at all;
- `set_keep_bias` moves the tokens alone, the widths stay{budget};
- it cannot be fine-tuned.
"""


def check_baked(source: Source, settings: ExportSection) -> None:
    """Refuse what has no one list of widths, and lists that a sampler does not have.

    Raises:
        DyditError: For everything that can be known without the weights.
    """
    refuse_baked(source)
    if source.config.get("block_heads") is not None:
        raise DyditError(
            "A pruned model has no schedule of widths.",
            why="It is static, and runs everything that is left of it at every timestep.",
            fix="Pass --format diffusers.",
        )
    check_folder(source, settings)
    schedule_of(_backbone(skeleton(source)), settings.steps, settings.sampler)


def write_baked(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write a pipeline folder without width routers, load it with its own code and compare it at every baked timestep.

    Raises:
        DyditError: For everything that a user can put right.
    """
    opened = open_model(source, settings, say)
    dynamic = _backbone(opened.model)
    if dynamic.budget_router is not None and dynamic.budget is None:
        dynamic.set_budget(dynamic.budget_router.high)
    before = nbytes_of(dynamic)
    # Decided in fp32 from the weights as they are written, whatever their type: that is what is compared below.
    dynamic.float()
    schedule = schedule_of(dynamic, settings.steps, settings.sampler)
    routing = decided(dynamic, schedule)
    written = bake(dynamic, schedule, routing, getattr(torch, opened.dtype))
    table = written.baked_widths.nbytes if written.baked_widths is not None else 0
    width = float(executed_ratio(routing, dynamic.geometry).mean())
    facts = {
        "schedule": f"{schedule.steps} steps of {names_of(schedule)} ({len(schedule.timesteps)} timesteps)",
        "size": size_of(nbytes_of(written) - table, table, before),
        "adaLN": adaln_of(dynamic.geometry, len(schedule.timesteps), torch.finfo(written.dtype).bits // 8),
        "width": f"{width:.3f} of attention and MLP, mean over them, all tokens",
    }
    say(facts["size"])

    def compare(transformer: Path, code: Path) -> float:
        return baked_difference(dynamic, schedule, transformer, code)

    return write_folder(
        source,
        settings,
        Opened(written, opened.dtype, opened.vae),
        folder,
        say,
        compare=compare,
        told=Told(
            steps=schedule.steps,
            introduction=BAKED.replace("{steps}", str(schedule.steps)),
            limits=limits_of(schedule, dynamic),
            notes=(
                f"It serves {schedule.steps} steps of {names_of(schedule)}; other timesteps are an error that names these.",
                "keep_bias moves its tokens and not its widths, and it cannot be fine-tuned.",
            ),
            facts=facts,
            verified=lambda difference: (
                f"Loaded with its own code, it has the same widths as the model at all {len(schedule.timesteps)} timesteps, and its "
                f"outputs differ by at most {difference:.1e}."
            ),
        ),
    )


@torch.no_grad()
def decided(model: DynamicTransformer, schedule: Schedule) -> Routing:
    """What the routers say of a schedule's timesteps, in their order."""
    model.eval()
    return model.routing(torch.tensor(schedule.timesteps, dtype=torch.float64))


def bake(
    model: DynamicTransformer, schedule: Schedule, routing: Routing, dtype: torch.dtype
) -> DynamicTransformer:
    """The model without width routers, with the masks of ``routing`` at the schedule's timesteps.

    Weights in ``dtype`` are shared, not copied.
    """
    budget = {} if model.budget_router is None else {"default_budget": model.budget}
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    config |= {"width": "free", "baked": {"steps": schedule.steps, "schedules": schedule.by_name}, **budget}
    with torch.device("meta"):
        baked = type(model)(**config)
    state: dict[str, Tensor] = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
        if not any(part in key for part in WIDTH_ROUTERS)
    }
    state["baked_widths.heads"] = routing.heads.bool().cpu()
    state["baked_widths.groups"] = routing.groups.bool().cpu()
    baked.load_state_dict(state, assign=True)
    return baked.eval()


@torch.no_grad()
def baked_difference(source: DynamicTransformer, schedule: Schedule, transformer: Path, code: Path) -> float:
    """Load a baked transformer with its shipped code and compare it with the dynamic model at every timestep.

    Args:
        source: The dynamic model, with the weights as written, in fp32.
        schedule: What was baked.
        transformer: The exported folder.
        code: The shipped file.

    Returns:
        The largest absolute difference.

    Raises:
        DyditError: If widths differ, or outputs by more than rounding.
    """
    dynamic = _backbone(pipeline_model(source).eval())
    dynamic.set_execution("compact")
    largest = 0.0
    with shipped(code) as module:
        names = family_of(source).pipeline_class.__name__, type(source).__name__
        in_pipelines, native = (
            getattr(module, name).from_pretrained(str(transformer), torch_dtype=torch.float32)
            for name in names
        )
        for index, t in enumerate(schedule.timesteps):
            here, there = source.routing(t), native.routing(t)
            if not (torch.equal(here.heads, there.heads) and torch.equal(here.groups, there.groups)):
                raise DyditError(
                    f"The exported model does not run what its source runs at the timestep {t:g}.",
                    why="The masks that were written are not those that the routers decide.",
                    fix="Nothing was written; report this with the versions that `pip list` shows for torch and diffusers.",
                )
            sample = normal(index, (1, *source.geometry.sample_shape), "export")
            given = torch.tensor([dynamic.given_timestep(t)])
            label = torch.tensor([index % max(1, source.geometry.num_classes)])
            expected = dynamic(sample, given, label, return_dict=False)[0]
            found = in_pipelines(sample, given, label, return_dict=False)[0]
            largest = max(largest, judged(found, expected))
    return largest


def _backbone(model: DynamicModel) -> DynamicTransformer:
    if not isinstance(model, DynamicTransformer):
        raise TypeError(type(model).__name__)
    return model


def size_of(weights: int, table: int, before: int) -> str:
    """Bytes of weights and table, against those of the dynamic model."""
    routers = megabytes(before - weights)
    return f"{megabytes(weights)} of weights and {megabytes(table)} of widths, in the place of {routers} of width routers"


def names_of(schedule: Schedule) -> str:
    """What asks for the timesteps."""
    return " and ".join(schedule.by_name)


def limits_of(schedule: Schedule, model: DynamicTransformer) -> str:
    """What the card says of what a baked model cannot do."""
    parts = "; ".join(
        f"{name} at {', '.join(f'{round(t, 4):g}' for t in times)}"
        for name, times in schedule.by_name.items()
    )
    budget = "" if model.budget_router is None else f", those of a budget of {model.budget:g}"
    return LIMITS.format(steps=schedule.steps, schedules=parts, budget=budget)


def adaln_of(geometry: Geometry, timesteps: int, width: int) -> str:
    """Why adaLN values are not written down, in bytes."""
    values = (6 * geometry.depth + 2) * geometry.hidden_size * width
    labels = geometry.num_classes + 1 if geometry.num_classes else 1
    table, layers = timesteps * labels * values, (geometry.hidden_size + 1) * values
    return f"computed when sampling: a table for all classes would be {megabytes(table)}, the layers are {megabytes(layers)}"


BAKED_FORMAT = Format(
    name="baked",
    summary="a pipeline folder with the widths of one schedule",
    families=("dit", "sit", "latte"),
    check=check_baked,
    write=write_baked,
    options=frozenset({"steps", "sampler"}),
    instead="Pass --format diffusers: the noise levels of a FLUX follow from the size of the picture, so that no one list of "
    "timesteps is known when it is exported.",
)
