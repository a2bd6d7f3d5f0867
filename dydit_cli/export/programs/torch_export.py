"""`--format torch-export`: a program of `torch.export` that runs with torch alone and skips what the routers leave out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dydit_cli.artifacts import load_model
from dydit_cli.artifacts.loading import model_folder
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.errors import DyditError
from dydit_cli.execution.compiled import first_line
from dydit_cli.export.flux import STREAMED
from dydit_cli.export.format import Format
from dydit_cli.export.programs.budget import settle_budget
from dydit_cli.export.programs.cards import torch_export_card
from dydit_cli.export.programs.cases import Case, live_cases
from dydit_cli.export.programs.comparing import difference_in_fresh_process, judged
from dydit_cli.export.programs.inputs import SAMPLE, changing_sizes
from dydit_cli.export.programs.program import LiveProgram, live_program
from dydit_cli.export.refusals import refuse_baked, refuse_budget, refuse_following_timestep
from dydit_cli.export.report import ExportReport, Progress, Source, report_of, subject_of
from dydit_cli.export.space import check_space
from dydit_cli.export.tensors import commonest_dtype
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.recipe.schema import ExportSection

FILE = "model.pt2"
TOLERANCE = 1e-5
"""Of the largest output: the order of summation, and nothing else, may differ."""
GRAPH_BYTES = 8 << 20
"""Room for the graph itself."""

NOTES = (
    "All samples of a call share one timestep; widths of a batch of mixed timesteps are beyond a program.",
    "There are no dials: keep_bias and budget are those of the export, and the complete model is --format static.",
    "A .pt2 file is a program. Load only those whose origin you trust.",
)


def check_program(source: Source, settings: ExportSection) -> None:
    """Refuse what a program cannot hold.

    Raises:
        DyditError: For everything that can be known without the weights.
    """
    refuse_parts(settings)
    refuse_following_timestep(source, settings)
    refuse_baked(source)
    refuse_budget(source, settings)


def write_torch_export(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write a program, run it in a fresh process that has torch alone, and compare.

    Raises:
        DyditError: For what a program cannot hold, and if it does not compute what the model computes.
    """
    dtype = settings.dtype or usual_type(source)
    say("reading the model")
    model = load_model(source.path, convention="native", budget=settings.budget)
    settle_budget(model)
    check_space(folder, bytes_in(model, getattr(torch, dtype)) + GRAPH_BYTES)
    say("running the model")
    cases = live_cases(model)
    geometry = model.geometry
    # Packed copies go before others are made.
    model.set_execution("dense")
    program = live_program(model).eval()
    difference = compare(program, cases)
    if dtype != "float32":
        program, cases = in_type(program, cases, getattr(torch, dtype))
    say("tracing the program")
    traced = trace(program, cases)
    say(f"writing {FILE} and running it in a fresh process")
    file = folder / FILE
    torch.export.save(traced, file)
    # The fresh process holds the weights once more.
    del model, program, traced
    difference = max(difference, difference_in_fresh_process(file, cases, TOLERANCE))
    subject = subject_of(source, settings, geometry, dtype)
    card = torch_export_card(subject, FILE, cases[-1].inputs)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report_of(
        source,
        settings,
        dtype,
        difference,
        needs_vae=False,
        notes=list(NOTES),
        verified=f"Run in a fresh process with torch alone, it differs from the model by at most {difference:.1e}.",
        facts={"takes": ", ".join(cases[-1].inputs), "skips": "heads, channel groups and tokens"},
    )


def usual_type(source: Source) -> str:
    """The type of a program's weights if none was asked for: of families whose weights pass one by one the stored one, else fp32."""
    if source.family.objective != STREAMED:
        return "float32"
    return commonest_dtype(lazily(open_checkpoint(model_folder(source.path)).tensors))


@torch.no_grad()
def compare(program: nn.Module, cases: list[Case]) -> float:
    """The largest difference of a program that was not traced yet.

    Raises:
        DyditError: If it is more than rounding.
    """
    found = [float((program(**case.inputs) - case.expected).abs().max()) for case in cases]
    return judged(found, [float(case.expected.abs().max()) for case in cases], TOLERANCE, "The program")


@torch.no_grad()
def in_type(program: LiveProgram, cases: list[Case], dtype: torch.dtype) -> tuple[LiveProgram, list[Case]]:
    """The program with weights of another type, and its own answers: rounding may move a token to the other side of a decision, so
    that the model's in fp32 are no measure of it. What was traced must still agree with it.
    """
    program = program.to(dtype)
    return program, [Case(case.inputs, program(**case.inputs)) for case in cases]


def trace(program: nn.Module, cases: list[Case]) -> ExportedProgram:
    """Trace a program on the inputs of the last case, whose batch is larger than one.

    Raises:
        DyditError: If torch cannot, as for routers of a plug-in whose code depends on values.
    """
    inputs = cases[-1].inputs
    model: DynamicModel = program.get_submodule("model")  # type: ignore[assignment]
    sizes: Mapping[str, object] = changing_sizes(model, without_numbers(inputs))
    shapes = {name: sizes.get(name, {}) for name in inputs}
    try:
        with torch.no_grad():
            traced = torch.export.export(program, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises errors of many kinds for what it cannot trace
        raise DyditError(
            "torch cannot trace the model.",
            why=first_line(error),
            fix="Use --format diffusers; if the routers are not a plug-in's, report this with torch's version.",
        ) from error
    for node in traced.graph.nodes:
        # Places in our source code, with folders of this machine.
        node.meta.pop("stack_trace", None)
    return traced


def without_numbers(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs that have a batch, the sample left out."""
    return {name: tensor for name, tensor in inputs.items() if tensor.ndim and name != SAMPLE}


def bytes_in(model: DynamicModel, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in another type."""
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
        for tensor in model.state_dict().values()
    )


def refuse_parts(settings: ExportSection) -> None:
    """Refuse what belongs to a pipeline.

    Raises:
        DyditError: If an autoencoder or a pipeline's parts were asked for.
    """
    for option in ("vae", "pipeline"):
        if getattr(settings, option):
            raise DyditError(
                f"The {settings.format} format takes no --{option}.",
                why="It is one step of the transformer; encoders and autoencoder are programs of their own.",
                fix=f"Leave --{option} out, or export with --format diffusers.",
            )


TORCH_EXPORT = Format(
    name="torch-export",
    summary="a program of torch.export, run by torch alone",
    families=("dit", "sit", "latte", "latte-t2v", "flux"),
    check=check_program,
    write=write_torch_export,
)
