"""Training in two processes: the numbers of one, under DDP, under FSDP2, and in parts; and checkpoints that any number can go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.data import TrainingBatches, open_data
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.training import fine_tune, prepare
from tests.objectives.base_models import tiny_model
from tests.training.runs import metrics_of, settings_for
from tests.training.together import RATIO_GRADIENT, ratio_gradient, start

STEPS = 4
COMMON: dict[str, Any] = {
    "steps": STEPS,
    "max_grad_norm": 1.0,
    "complete_branch_steps": 2,
    "evaluate_every": STEPS,
    "checkpoint_every": STEPS,
}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": COMMON | {"accumulate": 2},
    "fsdp2": COMMON | {"sharding": "fsdp2", "gradient_checkpointing": True},
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``one``, made by this process, and `RUNS`, made by two."""
    folder = tmp_path_factory.mktemp("together")
    fine_tune(settings_for(folder, out=str(folder / "one"), **COMMON))
    for ended in start(folder, RUNS, 2):
        assert ended.returncode == 0, ended.stdout
    return folder


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{STEPS:07d}" / f"{name}.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(runs: Path, name: str) -> None:
    alone, together = metrics_of(runs / "one"), metrics_of(runs / name)
    assert len(alone) == len(together) == STEPS
    for expected, line in zip(alone, together, strict=True):
        for key in (
            "loss",
            "denoising",
            "ratio_loss",
            "trained_ratio",
            "realised_ratio",
            "ema_ratio",
            "grad_norm",
        ):
            if expected[key] is None:
                assert line[key] is None
                continue
            assert line[key] == pytest.approx(expected[key], abs=TOLERANCE, rel=TOLERANCE), (
                key,
                expected["step"],
            )
    for file in ("model", "ema"):
        for key, tensor in weights(runs / "one", file).items():
            # Where a gradient is nothing but rounding, Adam takes a whole step in its direction: 1e-3 here.
            difference = (weights(runs / name, file)[key] - tensor).abs()
            assert float(difference.float().mean()) < 2e-5, key


def test_the_gradient_of_the_global_ratio_is_that_of_one_process(runs: Path) -> None:
    """A ratio squared in each process would differ: its two halves are not alike."""
    together = torch.load(runs / RATIO_GRADIENT)
    alone = ratio_gradient(runs, 1)
    assert together.keys() == alone.keys()
    routers = [name for name in alone if "_router." in name]
    assert routers
    for name in routers:
        assert float(alone[name].abs().max()) > 0
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-7)


def test_one_process_goes_on_from_what_two_have_sharded(runs: Path) -> None:
    more, warnings = STEPS + 1, {}
    for source in ("one", "fsdp2"):
        values = COMMON | {"steps": more, "resume": True}
        run = prepare(settings_for(runs, out=str(runs / source), **values))
        assert run.done == STEPS
        warnings[source] = " ".join(run.warnings)
        for _ in run.steps():
            pass
    alone, resumed = metrics_of(runs / "one")[-1], metrics_of(runs / "fsdp2")[-1]
    assert "processes 2 -> 1, sharding fsdp2 -> ddp" in warnings["fsdp2"]
    assert "not bit for bit" not in warnings["one"]
    assert alone["step"] == resumed["step"] == more
    assert resumed["loss"] == pytest.approx(alone["loss"], abs=1e-4)


def test_the_finished_artifact_is_whole(runs: Path) -> None:
    from dydit_cli.artifacts import load_model

    one, sharded = (load_model(runs / name).state_dict() for name in ("one", "fsdp2"))
    assert one.keys() == sharded.keys()
    for key, tensor in one.items():
        assert sharded[key].shape == tensor.shape
        assert float((sharded[key] - tensor).abs().float().mean()) < 2e-5, key


def test_each_process_reads_its_part_of_every_batch(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    data = open_data(settings.data, geometry=tiny_model().geometry)
    whole = TrainingBatches(data.train, 8, 0, data.mirror).at(3)
    for processes in (2, 4):
        parts = [
            TrainingBatches(data.train, 8, 0, data.mirror, rank=rank, processes=processes).at(3)
            for rank in range(processes)
        ]
        assert torch.equal(torch.cat([part.clean for part in parts]), whole.clean)
        assert sum((part.indices for part in parts), ()) == whole.indices


def test_parts_of_a_batch_give_the_numbers_of_the_whole(tmp_path: Path) -> None:
    """The ratio's loss is the square of a mean over all parts: squaring each part's own mean would be another loss."""
    lines = {}
    for accumulate in (1, 4):
        settings = settings_for(
            tmp_path, out=str(tmp_path / f"t{accumulate}"), accumulate=accumulate, ratio_weight=10.0, **COMMON
        )
        fine_tune(settings)
        lines[accumulate] = metrics_of(tmp_path / f"t{accumulate}")
    for whole, parts in zip(lines[1], lines[4], strict=True):
        for key in ("loss", "ratio_loss", "trained_ratio", "grad_norm"):
            assert parts[key] == pytest.approx(whole[key], abs=TOLERANCE, rel=TOLERANCE), key


@pytest.mark.parametrize("method", ["full", "td-lora"])
def test_gradients_with_checkpointing_are_the_same_bits(tmp_path: Path, method: str) -> None:
    """With the noise of the routers on, and the mixtures of adapters: a replay that drew or lost them would decide otherwise."""

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{checkpointing}"
        settings = settings_for(tmp_path, out=str(out), gradient_checkpointing=checkpointing, method=method)
        run = prepare(settings)
        assert checkpointing == any(
            getattr(module, "gradient_checkpointing", False) for module in run.model.modules()
        )
        steps = run.steps()
        # The second step: adapters begin at nothing.
        for _ in range(2):
            next(steps)
        return gradients_of(run.model)

    plain, replayed = gradients(False), gradients(True)
    assert plain.keys() == replayed.keys()
    assert any("lora" in name and float(value.abs().max()) > 0 for name, value in plain.items()) == (
        method != "full"
    )
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def gradients_of(model: DynamicModel) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.slow
def test_flux_bf16_and_adapters_in_two_processes(tmp_path: Path) -> None:
    """What is sharded for its size learns from a sharded teacher; bf16 blocks beside fp32 routers; adapters on shared weights."""
    from tests.flux_parts import prepared, saved_flux, write_pictures

    saved_flux(tmp_path / "flux", guidance_embeds=True)
    prepared(tmp_path / "cache", data=str(write_pictures(tmp_path / "pictures", [(8, 8)] * 12)))
    few: dict[str, Any] = {"steps": 3, "evaluate_every": 0, "checkpoint_every": 0}
    flux = few | {"model": str(tmp_path / "flux"), "data": str(tmp_path / "cache"), "batch_size": 4}
    alone: dict[str, dict[str, Any]] = {
        "flux": flux,
        "bf16": few | {"mixed_precision": "bf16"},
        "td-lora": few | {"method": "td-lora"},
    }
    for name, changes in alone.items():
        fine_tune(settings_for(tmp_path, out=str(tmp_path / "alone" / name), **changes))
    shared = {
        f"shared-{name}": changes | ({} if name == "td-lora" else {"sharding": "fsdp2"})
        for name, changes in alone.items()
    }
    shared["whole"] = few
    shared["half"] = few | {"steps": 2}
    shared["rest"] = few | {"out": str(tmp_path / "half"), "resume": True}
    for ended in start(tmp_path, shared, 2):
        assert ended.returncode == 0, ended.stdout
    file = Path("checkpoints", "step_0000003", "model.safetensors")
    resumed = (tmp_path / "half" / file).read_bytes()
    assert resumed == (tmp_path / "whole" / file).read_bytes(), (
        "a resumed run of two processes is the same bits"
    )
    for name in alone:
        # Under bf16 the sum of two gradients is rounded elsewhere than one gradient is.
        tolerance = 1e-3 if name == "bf16" else TOLERANCE
        for one, two in zip(
            metrics_of(tmp_path / "alone" / name), metrics_of(tmp_path / f"shared-{name}"), strict=True
        ):
            for key in ("loss", "trained_ratio", "realised_ratio"):
                assert two[key] == pytest.approx(one[key], abs=tolerance, rel=tolerance), (name, key)
