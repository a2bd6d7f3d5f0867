"""`dydit profile` as a person types it: what it prints where, what it writes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dydit_cli.artifacts import read_manifest, save_model
from dydit_cli.cli import profile as command
from dydit_cli.cli.app import main
from dydit_cli.cli.profile_tables import bar, macs
from tests.tiny import tiny_model

FAST = ("--device", "cpu", "--timesteps", "4", "--repetitions", "2", "--latency-batch", "1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved tiny dynamic SiT on latents."""
    folder = tmp_path / "t"
    folder.mkdir()
    save_model(tiny_model("sit"), folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty latents, of which four are held out."""
    path = tmp_path / "latents.npz"
    values = np.random.default_rng(0).normal(size=(40, 4, 8, 8)).astype(np.float32)
    np.savez(path, latents=values, labels=np.arange(40) % 10, scale=1.0)
    return path


def test_tables_on_stdout_and_the_rest_on_stderr(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--model", str(model), "--data", str(data), "--out", "p", *FAST]) == 0
    out, err = capsys.readouterr()
    for expected in ("ratio", "total ratio", "trajectory ratio", "counted", "= fvcore", "= torch"):
        assert expected in out
    for expected in ("static", "dense", "compact", "95% interval", "MiB", "heads", "groups", "tokens", "█"):
        assert expected in out
    assert "Written to p: profile.json, heads.png, groups.png, tokens.png, token_maps.png" in out
    assert err.count("what the papers call FLOPs are these") == 1
    assert "4 held-out samples" in err
    assert f"next: dydit sample --model {model}" in err
    assert sorted(path.name for path in Path("p").iterdir()) == [
        "groups.png",
        "heads.png",
        "manifest.json",
        "profile.json",
        "recipe.yaml",
        "token_maps.png",
        "tokens.png",
    ]


def test_json_alone_on_stdout(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "--model", str(model), "--data", str(data), *FAST]
    assert main([*arguments, "--json", "--no-latency", "--no-trajectory"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["ratio"] < report["total_ratio"] < 1
    assert len(report["timesteps"]) == 4
    assert {"t", "heads", "groups", "tokens"} <= set(report["timesteps"][0])
    assert report["params"]["routers"] > 0
    assert report["latency"] is None
    assert report["trajectory_ratio"] is None
    assert report["counted"]["compact"]["agrees"]


def test_the_folder_holds_what_was_printed_and_its_recipe_runs_again(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*FAST, "--no-latency", "--json"]
    assert main(["profile", "--model", str(model), "--data", str(data), "--out", "p", *quick]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(Path("p/profile.json").read_text()) == printed
    manifest = read_manifest("p")
    assert manifest["stage"] == "profile"
    assert manifest["results"]["ratio"] == printed["ratio"]
    assert main(["profile", "p/recipe.yaml", "out=again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == printed["ratio"]


def test_noise_in_the_place_of_data_is_announced(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["profile", "--model", str(model), *FAST, "--no-latency", "--no-trajectory", "--out", "p"]) == 0
    )
    out, err = capsys.readouterr()
    assert "warning: Noise instead of images" in err
    assert "token_maps.png" not in out


def test_an_untrained_model_is_sent_to_fine_tuning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    untrained = tiny_model()
    for block in untrained.dynamic_blocks:
        for router in (block.head_router, block.channel_router, block.token_router):
            router.reset_parameters()
    save_model(untrained, folder)
    assert main(["profile", "--model", str(folder), *FAST, "--no-latency", "--no-trajectory"]) == 0
    assert "next: dydit finetune" in capsys.readouterr().err


def test_a_preset_is_the_static_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--preset", "dit-s/8", "--no-latency", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "LayerNorm included" in out
    assert "without LayerNorm (torch's convention)" in out
    assert "by noise level" not in out
    assert "next: dydit convert" in err
    assert main(["profile", "--preset", "dit-s/8", "--no-latency", "--json", "--data", "nothing"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["gmacs"] == report["static_gmacs"]
    assert report["ratio"] == 1
    assert "not used" in captured.err


@pytest.mark.parametrize(
    ("given", "expected"),
    [((), (False, False)), (("latency",), (False, True)), (("trajectory",), (True, False))],
)
def test_large_models_are_timed_on_a_cpu_only_if_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], expected: tuple[bool, bool]
) -> None:
    from dydit_cli.recipe.schema import ProfileSection

    section = ProfileSection(model="t", **dict.fromkeys(given, True))
    assert command._affordable(section, tiny_model()) == (True, True)
    monkeypatch.setattr(command, "HEAVY_GMACS", 0.0)
    assert command._affordable(section, tiny_model()) == expected


def test_switched_off_stays_off() -> None:
    from dydit_cli.recipe.schema import ProfileSection

    assert command._affordable(ProfileSection(model="t", latency=False, trajectory=False), tiny_model()) == (
        False,
        False,
    )


def test_the_recipe_s_sampling_is_what_the_trajectory_follows(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dydit_cli.sampling.generate as generation

    seen: dict[str, object] = {}
    plain = generation.generate

    def spy(*arguments, **settings):
        seen.update(settings)
        return plain(*arguments, **settings)

    monkeypatch.setattr(generation, "generate", spy)
    Path("r.yaml").write_text(
        f"schema: 1\nname: r\nprofile:\n  model: {model}\n  data: {data}\n  latency: false\n  timesteps: 4\n"
        f"sample:\n  model: {model}\n  sampler: heun\n  steps: 3\n  guidance: 1\n  out: s\n"
    )
    assert main(["profile", "r.yaml", "--json"]) == 0
    assert (seen["sampler"], seen["steps"], seen["guidance"]) == ("heun", 3, 1)
    assert 0 < json.loads(capsys.readouterr().out)["trajectory_ratio"] < 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--model", "nothing"], "There is no model at nothing"),
        (["--preset", "dit-xl/3"], "There is no preset called 'dit-xl/3'"),
        (["--preset", "dit-s/8", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_refusals(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert what in err
    assert "\n  why: " in err
    assert "\n  fix: " in err
    assert not out


def test_an_existing_folder_is_refused_before_any_work(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p").mkdir()
    Path("p/kept").touch()
    assert main(["profile", "--model", "nothing", "--out", "p"]) == 2
    assert "p exists already" in capsys.readouterr().err
    assert (
        main(
            ["profile", "--model", str(model), "--out", "p", "--overwrite", "--no-latency", "--no-trajectory"]
        )
        == 0
    )
    assert not Path("p/kept").exists()


def test_data_that_do_not_fit_leave_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--model", str(model), "--data", "fashion-mnist-subset", "--out", "p"]) == 2
    assert "latents" in capsys.readouterr().err
    assert not Path("p").exists()


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, "             0%"), (0.05, "▌            5%"), (1.0, "██████████ 100%")],
)
def test_bars(share: float, expected: str) -> None:
    assert bar(share) == expected


def test_macs_have_a_unit_that_suits_them() -> None:
    assert macs(118.6887) == "118.69 G"
    assert macs(0.0436764) == "43.68 M"
