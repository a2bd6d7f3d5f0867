"""Runs that train adapters: what trains, what is held once, what a checkpoint and the artifact hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dydit_cli.adapters.attaching import adapted_layers
from dydit_cli.adapters.storing import load_adapters, read_settings
from dydit_cli.artifacts import load_for_training, load_model, read_manifest
from dydit_cli.artifacts.manifest import weights_hash
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError
from dydit_cli.execution import DenseExecutor
from dydit_cli.export.export import export
from dydit_cli.recipe.schema import ExportSection, FinetuneSection
from dydit_cli.training import FineTuning, checkpoint, prepare
from dydit_cli.training.parts import assemble
from tests.tiny import relative_difference, tiny_inputs
from tests.training.runs import metrics_of, settings_for
from tests.training.test_distillation import settings_of as flux_settings

METHODS = ("lora", "td-lora")
each_method = pytest.mark.parametrize("method", METHODS)


def run(settings: FinetuneSection, stop_after: int | None = None) -> FineTuning:
    started = prepare(settings)
    for _ in started.steps(should_stop=lambda: started.done == stop_after):
        pass
    if not started.interrupted:
        started.finish()
    return started


def settings_with(folder: Path, method: str, **changes: object) -> FinetuneSection:
    return settings_for(folder, **{"method": method, "learning_rate": 1e-2, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FineTuning]:
    """A whole run of each method, of which the tests only read."""
    return {method: run(settings_with(tmp_path_factory.mktemp(method), method)) for method in METHODS}


@each_method
def test_adapters_and_routers_train_and_nothing_else(runs: dict[str, FineTuning], method: str) -> None:
    started = runs[method]
    base = load_model(started.settings.model, execution="dense").state_dict()
    changed = {
        name
        for name, tensor in started.model.state_dict().items()
        if not torch.equal(tensor, base.get(name.replace(".base_layer", ""), tensor.new_full((), 7.0)))
    }
    assert {name for name in changed if "_router." in name}
    assert {name for name in changed if ".lora_B." in name}
    assert all("_router." in name or ".lora_" in name for name in changed)
    if method == "td-lora":
        assert {name for name in changed if ".lora_gate." in name}


@each_method
def test_frozen_weights_are_held_once(runs: dict[str, FineTuning], method: str) -> None:
    started = runs[method]
    average = dict(started.average.model.named_parameters())
    for name, parameter in started.model.named_parameters():
        trains = "_router." in name or ".lora_" in name
        assert (average[name] is parameter) != trains, name


def test_a_teacher_is_made_of_the_same_weights(runs: dict[str, FineTuning]) -> None:
    settings = runs["td-lora"].settings.model_copy(update={"loss": "distillation"})
    model = load_for_training(settings.model)
    arguments = tiny_inputs(model, 2)
    with torch.no_grad():
        expected, _ = model.denoise(*arguments, executor=model.make_executor("static"))
    parts = assemble(settings, model, torch.device("cpu"))
    assert parts.teacher is not None
    held = {id(parameter) for parameter in parts.model.parameters()}
    taught = parts.teacher._model  # type: ignore[attr-defined]
    assert all(id(parameter) in held for parameter in taught.parameters())
    with torch.no_grad():
        for _, layer in adapted_layers(parts.model):
            layer.lora_B["default"].weight.add_(1.0)
    assert torch.equal(parts.teacher.predict(*arguments), expected)


@each_method
def test_a_checkpoint_leaves_out_what_does_not_change(runs: dict[str, FineTuning], method: str) -> None:
    newest = checkpoint.checkpoints(Path(runs[method].settings.out))[-1]
    assert len(newest.facts["base_sha256"]) == 64
    for file in newest.path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            assert all(".lora_" in name or "_router." in name for name in stored.keys()), file


@each_method
def test_resuming_is_bit_for_bit(runs: dict[str, FineTuning], method: str, tmp_path: Path) -> None:
    assert run(settings_with(tmp_path, method), stop_after=3).interrupted
    again = run(settings_with(tmp_path, method, resume=True))
    expected = runs[method]
    assert metrics_of(tmp_path / "t") == metrics_of(Path(expected.settings.out))
    for one, other in ((expected.model, again.model), (expected.average.model, again.average.model)):
        found = other.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in one.state_dict().items())


def test_other_weights_below_a_checkpoint_are_noticed(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, "lora")
    run(settings, stop_after=3)
    file = Path(settings.model) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.mlp.fc1.weight"] += 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DyditError, match="changed since the run was started"):
        prepare(settings_with(tmp_path, "lora", resume=True))


@each_method
def test_the_artifact_needs_no_other_folder(runs: dict[str, FineTuning], method: str, tmp_path: Path) -> None:
    """Moved elsewhere, it gives what the averaged weights gave."""
    started = runs[method]
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in Path(started.settings.out).iterdir():
        if file.is_file():
            (moved / file.name).write_bytes(file.read_bytes())
    model = load_model(moved)
    arguments = tiny_inputs(model, 3)
    with torch.no_grad():
        expected, _ = started.average.model.denoise(*arguments, executor=DenseExecutor())
        found, _ = model.denoise(*arguments)
    assert relative_difference(found, expected) < 1e-5
    assert (model.config["td_lora"] is not None) == (method == "td-lora")
    assert read_manifest(moved)["settings"]["method"] == method


@each_method
def test_the_adapters_beside_it_give_the_same_on_the_base(runs: dict[str, FineTuning], method: str) -> None:
    started = runs[method]
    beside = Path(started.settings.out) / "adapter"
    model = load_model(started.settings.model, execution="dense")
    assert load_adapters(model, beside).kind == method == read_settings(beside).kind
    said = json.loads((beside / "dydit_adapter.json").read_text())
    assert said["base_sha256"] == weights_hash(Path(started.settings.model))
    arguments = tiny_inputs(model, 2)
    with torch.no_grad():
        expected, _ = started.average.model.denoise(*arguments, executor=DenseExecutor())
        found, _ = model.denoise(*arguments)
    assert torch.equal(found, expected)


def test_exports(runs: dict[str, FineTuning], tmp_path: Path) -> None:
    """TD-LoRA goes into a pipeline and into nothing else; merged LoRA into everything."""
    timed, plain = runs["td-lora"].settings.out, runs["lora"].settings.out
    for kind in ("static", "original"):
        with pytest.raises(DyditError, match="others at each timestep"):
            export(ExportSection(model=timed, out=str(tmp_path / kind), format=kind))
    export(ExportSection(model=timed, out=str(tmp_path / "pipeline"), format="diffusers"))
    exported = load_model(tmp_path / "pipeline")
    arguments = tiny_inputs(exported, 2)
    with torch.no_grad():
        assert torch.equal(exported.denoise(*arguments)[0], load_model(timed).denoise(*arguments)[0])
    export(ExportSection(model=plain, out=str(tmp_path / "s"), format="static"))
    (file,) = (path for path in (tmp_path / "s").iterdir() if path.suffix in (".pt", ".safetensors"))
    static = read_checkpoint(file).tensors
    merged = load_model(plain).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in static.items())
    assert "blocks.0.mlp.fc1.weight" in static


def test_no_second_adapter(runs: dict[str, FineTuning], tmp_path: Path) -> None:
    timed = runs["td-lora"].settings
    with pytest.raises(DyditError, match="takes no further adapters"):
        prepare(timed.model_copy(update={"model": timed.out, "out": str(tmp_path / "t")}))
    # All weights of such a model can be trained, its experts among them.
    whole = timed.model_copy(
        update={"model": timed.out, "out": str(tmp_path / "t"), "method": "full", "steps": 1}
    )
    before = load_model(timed.out).state_dict()
    after = run(whole).model.state_dict()
    assert not torch.equal(after["blocks.0.mlp.fc1.timed_experts"], before["blocks.0.mlp.fc1.timed_experts"])


def test_flux_learns_from_itself_without_adapters(tmp_path: Path) -> None:
    """Distillation, the default there: the teacher is the complete model below the adapters."""
    started = run(flux_settings(tmp_path, method="td-lora", learning_rate=1e-2))
    model = load_model(started.settings.out)
    assert model.config["td_lora"] == {"rank": 4, "experts": 4}
    arguments = tiny_inputs(model, 3)
    with torch.no_grad():
        expected, _ = started.average.model.denoise(*arguments, executor=DenseExecutor())
        found, _ = model.denoise(*arguments)
    assert relative_difference(found, expected) < 1e-5


def test_shards_are_for_whole_models() -> None:
    with pytest.raises(ValueError, match="goes with method full"):
        FinetuneSection(model="m", data="d", out="o", steps=1, method="lora", sharding="fsdp2")
