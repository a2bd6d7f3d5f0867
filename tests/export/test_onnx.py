"""ONNX graphs of a baked schedule: onnxruntime computes what the model computes, at any batch, from one copy of the weights."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dydit_cli
from dydit_cli.artifacts import load_model, save_model
from dydit_cli.errors import DyditError
from dydit_cli.export.export import ExportReport
from dydit_cli.export.programs.cases import baked_cases
from dydit_cli.export.programs.onnx_export import FILE, PACKAGES, TOLERANCE, run_and_compare
from dydit_cli.export.programs.program import BakedProgram
from dydit_cli.export.programs.torch_export import compare
from dydit_cli.objectives.schedules import timesteps_of
from tests.export.artifacts import exported, trained
from tests.tiny import tiny_inputs, tiny_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = {
    "hidden_size": 24,
    "num_layers": 1,
    "num_attention_heads": 3,
    "in_channels": 1,
    "sample_size": 32,
    "patch_size": 8,
}
STEPS = 4
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("dit", {}),
    "sit": ("sit", {}),
    "ordered width": ("dit", {"width": "ordered"}),
    "no always-on unit": ("sit", {"always_on": False}),
}


@pytest.mark.parametrize(("family", "changes"), VARIANTS.values(), ids=list(VARIANTS))
def test_a_baked_program_computes_what_the_model_does_without_width_routers(
    family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family, **changes).requires_grad_(False).set_execution("compact")
    _, times = timesteps_of("diffusion" if family == "dit" else "flow", None, STEPS)
    widths = model.routing(times.float())
    cases = baked_cases(model, times.tolist(), widths)
    program = BakedProgram(model.set_execution("dense"), times, widths).eval()
    compare(program, cases)
    assert not [name for name, _ in program.named_parameters() if "head_router" in name or "channel_" in name]
    assert len({tuple(row) for row in program.heads.flatten(1).tolist()}) > 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ExportReport]:
    """A model, the folder of its graph, and the report."""
    folder = tmp_path_factory.mktemp("graphs")
    source = trained(folder / "dit", "dit", **SMALL)
    return source, folder / "graph", exported(source, folder / "graph", "onnx", steps=STEPS)


def session_of(folder: Path) -> Any:
    """The graph, ready to run."""
    return onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])


def test_every_step_and_batch_within_a_ten_thousandth(written: tuple[Path, Path, ExportReport]) -> None:
    source, folder, report = written
    assert report.max_difference <= TOLERANCE
    assert "onnxruntime" in report.verified
    model, session = load_model(source), session_of(folder)
    times = json.loads(session.get_modelmeta().custom_metadata_map["timesteps"])
    assert len(times) == STEPS
    for batch in (1, 3):
        sample, _, labels = tiny_inputs(model, batch)
        for step, time in enumerate(times):
            inputs = {"sample": sample.numpy(), "step": np.array(step), "class_labels": labels.numpy()}
            (found,) = session.run(["prediction"], inputs)
            expected = model(sample, time, labels).sample
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_the_weights_stand_there_once_and_nothing_of_this_machine(
    written: tuple[Path, Path, ExportReport],
) -> None:
    source, folder, _ = written
    graph = onnx.load(folder / FILE)
    stored = sum(tensor.nbytes for tensor in load_model(source).state_dict().values())
    assert sum(len(part.raw_data) for part in graph.graph.initializer) <= 1.02 * stored
    assert "NonZero" in {node.op_type for node in graph.graph.node}
    assert str(Path(dydit_cli.__file__).resolve().parent).encode() not in (folder / FILE).read_bytes()


def test_a_graph_that_computes_something_else_is_refused(written: tuple[Path, Path, ExportReport]) -> None:
    _, folder, _ = written
    other = tiny_model("dit", seed=1, **SMALL).set_execution("compact")
    times = [999, 666, 333, 0]
    cases = baked_cases(other, times, other.routing(torch.tensor(times).float()))
    with pytest.raises(DyditError, match="does not compute what the model computes"):
        run_and_compare(folder / FILE, cases)


def test_the_cards_code_draws(
    written: tuple[Path, Path, ExportReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, _ = written
    monkeypatch.chdir(folder.parent)
    assert drawn((folder / "README.md").read_text(encoding="utf-8")).shape == (2, 1, 32, 32)


def test_the_pages_code_draws(
    written: tuple[Path, Path, ExportReport], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, _ = written
    monkeypatch.chdir(folder.parent)
    page = (repository / "docs" / "export.md").read_text(encoding="utf-8")
    assert drawn(page.replace("runs/graph", folder.name)).shape == (2, 1, 32, 32)


def drawn(page: str) -> Any:
    """What the code with a graph in a card or a page draws."""
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (code,) = [snippet for snippet in snippets if FILE in snippet]
    names: dict[str, Any] = {}
    exec(code, names)
    assert bool(np.isfinite(names["images"]).all())
    return names["images"]


@pytest.mark.slow
def test_no_tokens_and_no_heads_at_all_and_weights_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dydit_cli.export.programs.onnx_export.INLINE_BYTES", 0)
    model = tiny_model("sit", always_on=False, **SMALL)
    with torch.no_grad():
        for block in model.dynamic_blocks:
            for router in (block.head_router, block.channel_router, block.token_router):
                router.shift(-1e4)
    save_model(model, tmp_path / "sit")
    report = exported(tmp_path / "sit", tmp_path / "out", "onnx", steps=STEPS)
    assert report.max_difference <= TOLERANCE
    assert {FILE, f"{FILE}.data"} <= set(report.files) == set(report.files) | set(report.sha256)
    assert json.loads(session_of(tmp_path / "out").get_modelmeta().custom_metadata_map["timesteps"])[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sit", "ordered width"])
def test_other_models_are_written_and_draw(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = VARIANTS[name]
    source = trained(tmp_path / "model", family, **changes)
    report = exported(source, tmp_path / "graph", "onnx", steps=STEPS)
    assert report.max_difference <= TOLERANCE
    monkeypatch.chdir(tmp_path)
    drawn((tmp_path / "graph" / "README.md").read_text(encoding="utf-8"))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named(
    missing: str,
    written: tuple[Path, Path, ExportReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "dydit_cli.export.programs.onnx_export.find_spec",
        lambda name: None if name == missing else find(name),
    )
    with pytest.raises(DyditError) as caught:
        exported(written[0], tmp_path / "out", "onnx")
    assert f"needs {missing}," in str(caught.value)
    assert "pip install onnx onnxscript onnxruntime" in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, "does not write bfloat16"),
        ({"sampler": "dopri5"}, "not known before it runs"),
        ({"vae": "v"}, "takes no --vae"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(
    written: tuple[Path, Path, ExportReport], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DyditError, match=message):
        exported(written[0], tmp_path / "out", "onnx", **settings)
    assert not (tmp_path / "out").exists()


def test_other_families_are_sent_to_torch_export(tmp_path: Path) -> None:
    source = trained(tmp_path / "latte", "latte", **SMALL)
    with pytest.raises(DyditError, match="torch-export"):
        exported(source, tmp_path / "out", "onnx")
