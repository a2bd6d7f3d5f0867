"""`--format onnx`: a graph for onnxruntime. The widths of a schedule are tables, tokens are skipped, the weights stand there once."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.errors import DyditError
from dydit_cli.execution.compiled import first_line
from dydit_cli.export.format import Format
from dydit_cli.export.programs.budget import settle_budget
from dydit_cli.export.programs.cards import onnx_card
from dydit_cli.export.programs.cases import Case, baked_cases
from dydit_cli.export.programs.comparing import judged
from dydit_cli.export.programs.program import BakedProgram
from dydit_cli.export.programs.torch_export import GRAPH_BYTES, bytes_in, check_program, compare, trace
from dydit_cli.export.report import ExportReport, Progress, Source, report_of, subject_of
from dydit_cli.export.sizes import megabytes
from dydit_cli.export.space import check_space
from dydit_cli.objectives.schedules import timesteps_of
from dydit_cli.recipe.schema import ExportSection

FILE = "model.onnx"
OUTPUT = "prediction"
TOLERANCE = 1e-4
"""Of the largest output: onnxruntime has kernels of its own."""
OPSET = 20
"""The first that has GELU."""
INLINE_BYTES = 1 << 30
"""Weights beyond stand in a file beside the graph: a protobuf holds at most 2 GiB."""
STEPS = 50
SAMPLERS = {"diffusion": "ddim", "flow": "euler"}
"""Those that the card's code has."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

NOTES = (
    "It serves the timesteps of its schedule; another schedule needs another export.",
    "All samples of a call share one step, and there are no dials: keep_bias and budget are those of the export.",
)


def check_onnx(source: Source, settings: ExportSection) -> None:
    """Refuse what a graph cannot hold.

    Raises:
        DyditError: If a package is missing, and for everything else that can be known without the weights.
    """
    check_packages()
    check_program(source, settings)
    refuse_other_types(settings)
    _schedule(source, settings)


def write_onnx(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write a graph, run it by onnxruntime and compare.

    Raises:
        DyditError: If the graph cannot hold the model, or does not compute what it computes.
    """
    steps, sampler, times = _schedule(source, settings)
    say("reading the model")
    model = load_model(source.path, convention="native", budget=settings.budget)
    settle_budget(model)
    weights = bytes_in(model, torch.float32)
    check_space(folder, weights + GRAPH_BYTES)
    widths = model.routing(times.float())
    say("running the model")
    cases = baked_cases(model, times.tolist(), widths)
    geometry = model.geometry
    model.set_execution("dense")
    program = BakedProgram(model, times, widths).eval()
    compare(program, cases)
    say("tracing the graph")
    file = folder / FILE
    save_graph(program, cases, file, metadata_of(source, sampler, times.tolist()))
    say(f"running {FILE} by onnxruntime")
    difference = run_and_compare(file, cases)
    subject = subject_of(source, settings, geometry, "float32")
    card = onnx_card(subject, FILE, sampler=sampler, steps=steps, timesteps=len(times))
    (folder / "README.md").write_text(card, encoding="utf-8")
    size = sum(part.stat().st_size for part in folder.glob(f"{FILE}*"))
    return report_of(
        source,
        settings,
        "float32",
        difference,
        needs_vae=False,
        notes=list(NOTES),
        verified=f"Run by onnxruntime, it differs from the model by at most {difference:.1e}.",
        facts={
            "schedule": f"{steps} steps of dydit sample --sampler {sampler} ({len(times)} timesteps)",
            "size": f"{megabytes(size)}, against {megabytes(weights)} of weights with width routers",
        },
    )


def _schedule(source: Source, settings: ExportSection) -> tuple[int, str, Tensor]:
    """Steps, the sampler's name and its timesteps.

    Raises:
        DyditError: As `timesteps_of`.
    """
    steps = STEPS if settings.steps is None else settings.steps
    objective = source.family.objective
    return steps, *timesteps_of(objective, settings.sampler or SAMPLERS[objective], steps)


def check_packages() -> None:
    """See that what writes and runs graphs is installed.

    Raises:
        DyditError: If it is not.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise DyditError(
            f"The onnx format needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            why="torch writes graphs with onnx and onnxscript, and what was written is run by onnxruntime.",
            fix=f"Run `python -m pip install {' '.join(PACKAGES)}`, or use --format torch-export, which needs none of them.",
        )


def refuse_other_types(settings: ExportSection) -> None:
    """Refuse weights of a type in which nothing could be compared.

    Raises:
        DyditError: For another type than fp32.
    """
    if settings.dtype not in (None, "float32"):
        raise DyditError(
            f"The onnx format does not write {settings.dtype}.",
            why="onnxruntime's CPU kernels, by which the graph is compared with the model, compute in float32.",
            fix="Leave --dtype out; onnxruntime's own tools turn a graph into another type.",
        )


def metadata_of(source: Source, sampler: str, timesteps: Sequence[float]) -> dict[str, str]:
    """What a graph says of itself."""
    return {
        "family": source.family.name,
        "sampler": sampler,
        "timesteps": json.dumps(list(timesteps)),
        "producer": "dydit",
    }


def save_graph(program: BakedProgram, cases: Sequence[Case], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a program as a graph.

    Raises:
        DyditError: If torch cannot.
    """
    traced = trace(program, list(cases))
    try:
        with quietly(), torch.no_grad():
            graph: Any = torch.onnx.export(
                traced,
                kwargs=cases[-1].inputs,
                dynamo=True,
                input_names=list(cases[-1].inputs),
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise DyditError(
            "torch cannot write the model as a graph.",
            why=first_line(error),
            fix="Use --format torch-export, and report this with the versions of torch and onnxscript.",
        ) from error
    for node in graph.model.graph.all_nodes():
        # Places in our source code, and in which module an operation stood: more bytes than the graph itself.
        node.metadata_props.clear()
        node.doc_string = None
        allow_empty(node)
    graph.model.metadata_props.update(metadata)
    weights = sum(tensor.nbytes for tensor in program.state_dict().values())
    with quietly():
        graph.save(str(file), external_data=weights > INLINE_BYTES)


def allow_empty(node: Any) -> None:
    """Have a node that reshapes take a computed size of zero, no heads at all, for a zero and not for "as it was"."""
    if node.op_type == "Reshape" and node.inputs[1].const_value is None:
        from onnx_ir import AttrInt64

        node.attributes.add(AttrInt64("allowzero", 1))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what torch's exporter says of packages that are not needed and of names that are shared."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run_and_compare(file: Path, cases: Sequence[Case]) -> float:
    """The largest difference of what onnxruntime computes.

    Raises:
        DyditError: If it is more than rounding.
    """
    import onnxruntime

    differences = []
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for case in cases:
            inputs = {name: tensor.numpy() for name, tensor in case.inputs.items()}
            (found,) = session.run([OUTPUT], inputs)
            differences.append(float((torch.from_numpy(found) - case.expected).abs().max()))
    except Exception as error:  # its errors have no class in common
        raise DyditError(
            "onnxruntime cannot run the graph.",
            why=first_line(error),
            fix="Nothing was written; report this with the versions of torch, onnxscript and onnxruntime.",
        ) from error
    scales = [float(case.expected.abs().max()) for case in cases]
    return judged(differences, scales, TOLERANCE, "The graph")


ONNX = Format(
    name="onnx",
    summary="a graph for onnxruntime, widths of a schedule baked",
    families=("dit", "sit"),
    check=check_onnx,
    write=write_onnx,
    options=frozenset({"steps", "sampler"}),
    instead="Pass --format torch-export, which takes every family.",
)
