"""Programs of torch.export: they compute what the model computes, with torch alone, and skip what the routers leave out."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dydit_cli
from dydit_cli.artifacts import load_model, save_model
from dydit_cli.errors import DyditError
from dydit_cli.export.export import ExportReport, opened
from dydit_cli.export.programs.budget import settle_budget
from dydit_cli.export.programs.cases import Case, live_cases
from dydit_cli.export.programs.comparing import difference_in_fresh_process, judged
from dydit_cli.export.programs.inputs import SAMPLE, tensors_of
from dydit_cli.export.programs.program import live_program
from dydit_cli.export.programs.torch_export import FILE, TOLERANCE, compare, usual_type
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import family_named
from dydit_cli.recipe.schema import ExportSection
from tests.export.artifacts import exported, trained
from tests.tiny import CONFIGS, tiny_inputs, tiny_model

SMALL = {"hidden_size": 24, "num_layers": 1, "num_attention_heads": 3, "sample_size": 32, "patch_size": 8}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("dit", {}),
    "sit": ("sit", {}),
    "latte": ("latte", {}),
    "unconditional latte": ("latte", {"num_classes": 0}),
    "latte-t2v": ("latte-t2v", {}),
    "flux": ("flux", {}),
    "flux without guidance": ("flux", {"guidance_embeds": False}),
    "flux with latents beside the sample": ("flux", {"in_channels": 24, "out_channels": 16}),
    "flux without width routers": ("flux", {"width": False}),
    "ordered width": ("dit", {"width": "ordered"}),
    "no always-on unit": ("sit", {"always_on": False}),
    "pruned": ("dit", {"block_heads": [3, 1, 6], "block_hidden": [32, 64, 192]}),
}


def model_of(family: str, changes: dict[str, Any]) -> DynamicModel:
    """A tiny model that runs compactly."""
    balanced = not changes.get("block_heads") and changes.get("width", "free") is not False
    model = tiny_model(family, **changes) if balanced else unbalanced(family, changes)
    model.requires_grad_(False)
    return model.set_execution("compact")


def unbalanced(family: str, changes: dict[str, Any]) -> DynamicModel:
    """A model of random weights, some of whose routers do not exist."""
    from dydit_cli.families.registry import family_named
    from tests.tiny import tiny_config

    named = family_named(family)
    model = named.build(tiny_config(named, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def program_of(model: DynamicModel) -> torch.nn.Module:
    """Its program, before tracing."""
    return live_program(model.set_execution("dense")).eval()


def called(module: Callable[..., Tensor], case: Case) -> Tensor:
    """Call it as a case says."""
    with torch.no_grad():
        return module(**case.inputs)


@pytest.mark.parametrize(("family", "changes"), VARIANTS.values(), ids=list(VARIANTS))
def test_a_program_computes_what_the_model_does_and_holds_each_weight_once(
    family: str, changes: dict[str, Any]
) -> None:
    model = model_of(family, changes)
    cases = live_cases(model)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    program = program_of(model)
    compare(program, cases)
    assert sum(tensor.nbytes for tensor in program.state_dict().values()) <= 1.02 * stored
    assert len({len(case.inputs[SAMPLE]) for case in cases}) > 1
    with pytest.raises(DyditError, match="does not compute"):
        compare(program, [Case(cases[0].inputs, cases[0].expected * 1.001)])


@pytest.mark.parametrize("budget", [0.4, 0.9])
def test_a_budget_becomes_part_of_the_biases(budget: float) -> None:
    model = tiny_model("dit", budgets=[0.3, 1.0], default_budget=0.6).requires_grad_(False)
    model.set_budget(budget)
    sample, _, labels = tiny_inputs(model)
    times = (900.0, 100.0)
    before = [model.denoise(sample, time, labels) for time in times]
    settle_budget(model)
    assert model.budget_router is None
    for time, (expected, routing) in zip(times, before, strict=True):
        found, decided = model.denoise(sample, time, labels)
        assert torch.equal(decided.heads, routing.heads)
        assert torch.equal(decided.tokens, routing.tokens)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def flops(token_shift: float, width_shift: float) -> int:
    """Of a call of a program whose routers keep more or less."""
    model = model_of("dit", {})
    with torch.no_grad():
        for block in model.dynamic_blocks:
            block.token_router.shift(token_shift)
            block.head_router.shift(width_shift)
            block.channel_router.shift(width_shift)
    sample, _, labels = tiny_inputs(model)
    program = program_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program(sample, torch.tensor(500.0), labels)
    return int(counter.get_total_flops())


def test_what_is_off_is_not_computed() -> None:
    everything, no_tokens, least = flops(1e4, 1e4), flops(-1e4, 1e4), flops(-1e4, -1e4)
    geometry = tiny_model("dit").geometry
    mlp = 2 * 2 * 3 * geometry.num_tokens * geometry.hidden_size * geometry.mlp_hidden * geometry.depth
    assert everything - no_tokens == mlp
    assert least < 0.7 * no_tokens


# ------------------------------------------------------------------ what the command writes


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ExportReport]:
    """A model, the folder of its program, and the report."""
    folder = tmp_path_factory.mktemp("programs")
    source = trained(folder / "dit", "dit", **SMALL)
    report = exported(source, folder / "program", "torch-export")
    return source, folder / "program", report


def test_the_report_says_what_was_verified(written: tuple[Path, Path, ExportReport]) -> None:
    _, folder, report = written
    assert report.format == "torch-export"
    assert report.max_difference <= TOLERANCE
    assert "fresh process" in report.verified
    assert set(report.files) == {"README.md", FILE}
    assert FILE in report.sha256
    assert (folder / "manifest.json").is_file()


def test_any_batch_and_timestep(written: tuple[Path, Path, ExportReport]) -> None:
    source, folder, _ = written
    model = load_model(source)
    step = torch.export.load(folder / FILE).module()
    for batch, time in ((1, 999.0), (2, 0.0), (5, 321.5)):
        sample, _, labels = tiny_inputs(model, batch, seed=batch)
        case = Case(
            {SAMPLE: sample, "timestep": torch.tensor(time), **tensors_of(labels, True)},
            model(sample, time, labels).sample,
        )
        torch.testing.assert_close(called(step, case), case.expected, rtol=1e-5, atol=1e-5)


def test_the_cards_code_runs_with_torch_alone(written: tuple[Path, Path, ExportReport]) -> None:
    _, folder, _ = written
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    absent = "import sys\nfor name in ('dydit_cli', 'diffusers', 'transformers'): sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", absent + code + "print(tuple(prediction.shape))"],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "(2, 8, 32, 32)", done.stderr


def test_the_pages_code_runs(
    written: tuple[Path, Path, ExportReport], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, _ = written
    monkeypatch.chdir(folder.parent)
    page = (repository / "docs" / "export.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (code,) = [snippet for snippet in snippets if "model.pt2" in snippet]
    names: dict[str, Any] = {}
    exec(code.replace("runs/program", folder.name), names)
    assert names["prediction"].shape == (2, 8, 32, 32)


def test_no_place_of_this_machine_is_in_the_file(written: tuple[Path, Path, ExportReport]) -> None:
    _, folder, _ = written
    ours = str(Path(dydit_cli.__file__).resolve().parent).encode()
    with zipfile.ZipFile(folder / FILE) as archive:
        assert not [name for name in archive.namelist() if ours in archive.read(name)]


@pytest.mark.slow
def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(DyditError, match="cannot be run in a fresh process"):
        difference_in_fresh_process(tmp_path / FILE, [], TOLERANCE)


def test_the_type_is_the_stored_one_where_weights_are_many(tmp_path: Path) -> None:
    flux = family_named("flux").build(CONFIGS["flux"]).to(torch.bfloat16)
    (tmp_path / "flux").mkdir()
    save_model(flux, tmp_path / "flux")
    trained(tmp_path / "dit", "dit", **SMALL)
    for name, dtype in (("flux", "bfloat16"), ("dit", "float32")):
        settings = ExportSection(model=str(tmp_path / name), out=tmp_path / "e", format="torch-export")
        assert usual_type(opened(settings)[0]) == dtype


def test_the_fresh_process_has_the_users_packages_and_none_of_our_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `pip install --user`, or with PYTHONPATH."""
    (tmp_path / "torch.py").write_text(
        "import sys\nraise ImportError('of the user, ' + str(any('dydit_cli' in place for place in sys.path)))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DyditError) as caught:
        difference_in_fresh_process(tmp_path / "model.pt2", [], TOLERANCE)
    assert caught.value.why == "ImportError: of the user, False"


@pytest.mark.parametrize("difference", [float("nan"), 1.1 * TOLERANCE])
def test_a_program_that_computes_something_else_is_refused(difference: float) -> None:
    with pytest.raises(DyditError, match="does not compute what the model computes"):
        judged([0.0, difference], [1.0, 1.0], TOLERANCE, "The program")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vae": "v"}, "takes no --vae"),
        ({"pipeline": "p"}, "takes no --pipeline"),
        ({"steps": 3}, "takes no --steps"),
    ],
)
def test_what_belongs_to_other_formats_is_refused(
    written: tuple[Path, Path, ExportReport], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DyditError, match=message):
        exported(written[0], tmp_path / "out", "torch-export", **settings)
    assert not (tmp_path / "out").exists()


def test_weights_that_follow_the_timestep_are_refused(tmp_path: Path) -> None:
    source = trained(tmp_path / "timed", "dit", td_lora={"rank": 2, "experts": 2}, **SMALL)
    with pytest.raises(DyditError, match="TD-LoRA"):
        exported(source, tmp_path / "out", "torch-export")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in VARIANTS if name not in ("dit", "flux without guidance", "flux without width routers")],
)
def test_every_family_is_written_and_runs_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[name]
    (tmp_path / "model").mkdir()
    save_model(model_of(family, changes), tmp_path / "model")
    report = exported(tmp_path / "model", tmp_path / "out", "torch-export")
    assert report.max_difference <= 1e-4
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"out/', f'"{tmp_path}/out/'), names)
    assert bool(names["prediction"].isfinite().all())


@pytest.mark.slow
def test_other_types_are_compared_with_the_program_itself(tmp_path: Path) -> None:
    source = trained(tmp_path / "dit", "dit", **SMALL)
    report = exported(source, tmp_path / "out", "torch-export", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    step = torch.export.load(tmp_path / "out" / FILE).module()
    model = load_model(source)
    sample, _, labels = tiny_inputs(model, 2)
    case = Case({SAMPLE: sample, "timestep": torch.tensor(500.0), "class_labels": labels}, sample)
    assert called(step, case).dtype == torch.bfloat16
