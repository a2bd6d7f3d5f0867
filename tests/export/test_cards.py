"""What every card says: where the weights come from, under which licence, what was measured, in a head that the Hub reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import dydit_cli
from dydit_cli.artifacts import read_manifest, save_model, write_manifest
from dydit_cli.artifacts.manifest import weights_hash
from dydit_cli.checkpoints.terms import Terms
from dydit_cli.errors import DyditError
from dydit_cli.export.export import opened
from dydit_cli.export.formats import FORMATS
from dydit_cli.export.lineage import lineage_of
from dydit_cli.export.metadata import LICENSES, chosen_terms, front_matter, license_fields
from dydit_cli.recipe.schema import ExportSection
from tests.export.artifacts import exported, static_checkpoint, trained
from tests.tiny import tiny_model


def head_of(folder: Path) -> dict[str, Any]:
    """The head of a card, as the Hub's own client reads it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    said = ModelCard(text).data.to_dict()
    assert said == yaml.safe_load(text.split("---")[1])
    return said


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A conversion of a checkpoint that says where it comes from, and what training made of it."""
    source = tmp_path / "models--somebody--dit-tiny" / "snapshots" / "abc"
    source.mkdir(parents=True)
    static_checkpoint(source / "dit.pt", in_channels=1)
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    dydit_cli.convert(source / "dit.pt", out=tmp_path / "c", family="dit", num_heads=6)
    folder = tmp_path / "t"
    folder.mkdir()
    save_model(tiny_model("dit", in_channels=1), folder)
    write_manifest(
        folder,
        stage="finetune",
        settings={"target_ratio": 0.5, "data": "images/", "seed": 0},
        parent=tmp_path / "c",
        results={"ratio": 0.512, "steps": 7},
    )
    return folder


@pytest.mark.parametrize("kind", ["diffusers", "original", "static"])
def test_licence_and_base_go_along(kind: str, model: Path, tmp_path: Path) -> None:
    report = exported(model, tmp_path / "e", kind)
    head = head_of(tmp_path / "e")
    assert report.license == head["license"] == "cc-by-nc-4.0"
    assert (head["base_model"], head["base_model_relation"]) == ("somebody/dit-tiny", "finetune")
    assert head["library_name"] == ("diffusers" if kind == "diffusers" else "dydit")
    assert head["pipeline_tag"] == "unconditional-image-generation"
    assert head["tags"] == ["dydit", "dit"]
    card = (tmp_path / "e" / "README.md").read_text()
    assert "[somebody/dit-tiny](https://huggingface.co/somebody/dit-tiny)" in card
    assert "cc-by-nc-4.0" in card.partition("## Licence")[2]
    assert str(tmp_path) not in card


def test_every_format_has_a_head_that_names_the_licence() -> None:
    """New formats build on `head`; this sees that none writes a head of its own."""
    import dydit_cli.export as room

    folder = Path(next(iter(room.__path__)))
    own = [
        file.name
        for file in folder.rglob("*.py")
        if file.name != "metadata.py"
        and "\n---\n" in file.read_text(encoding="utf-8")
        and "tags:" in file.read_text()
    ]
    assert own == []
    assert FORMATS


def test_an_export_hands_it_on(model: Path, tmp_path: Path) -> None:
    exported(model, tmp_path / "e")
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "c")
    assert lineage_of(tmp_path / "e").terms["license"] == "cc-by-nc-4.0"
    exported(tmp_path / "e", tmp_path / "again")
    assert head_of(tmp_path / "again")["base_model"] == "somebody/dit-tiny"


def test_an_unknown_licence_is_said_to_be_unknown(tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    assert exported(model, tmp_path / "e").license == "unknown"
    assert head_of(tmp_path / "e")["license"] == "unknown"
    assert "--license" in (tmp_path / "e" / "README.md").read_text()
    assert "base_model" not in head_of(tmp_path / "e")


def test_the_users_word_counts(model: Path, tmp_path: Path) -> None:
    exported(model, tmp_path / "e", license="My Company Licence")
    head = head_of(tmp_path / "e")
    assert (head["license"], head["license_name"]) == ("other", "My Company Licence")
    assert "as whoever exported them says" in (tmp_path / "e" / "README.md").read_text()
    with pytest.raises(DyditError, match="no licence that the Hub knows"):
        exported(model, tmp_path / "f", license="apache2.0")
    assert not (tmp_path / "f").exists()


def test_licences_with_names_of_their_own() -> None:
    flux = Terms(
        "other", "flux-1-dev-non-commercial-license", "LICENSE.md", None, "black-forest-labs/FLUX.1-dev"
    )
    assert license_fields(flux) == {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    }
    assert license_fields(Terms("someones-own")) == {"license": "other", "license_name": "someones-own"}
    assert chosen_terms(Terms("mit"), None).license == "mit"
    assert chosen_terms(Terms(repository="a/b"), "MIT") == Terms("mit", said_by="--license", repository="a/b")
    assert "cc-by-nc-4.0" in LICENSES


def test_a_head_is_yaml_whatever_it_holds() -> None:
    odd = Terms("other", 'a: "licence" # of ours', None, None, None)
    said = yaml.safe_load(front_matter(odd, ("dydit",), "library_name: diffusers\n").strip("-\n"))
    assert said["license_name"] == 'a: "licence" # of ours'


# ------------------------------------------------------------------ measured


def write_profile(folder: Path, model: Path | None, ratio: float = 0.512) -> Path:
    folder.mkdir()
    content = {
        "ratio": ratio,
        "gmacs": 0.0456,
        "static_gmacs": 0.0833,
        "total_ratio": 0.547,
        "trajectory_ratio": 0.53,
        "latency": {
            "ratio": 0.61,
            "interval": [0.59, 0.63],
            "static_ms": 10.0,
            "compact_ms": 6.1,
            "repetitions": 11,
            "batch": 4,
            "device": "cpu (x86_64, 1 threads)",
            "dtype": "float32",
        },
        "inputs": {"note": "Held-out samples of images/."},
    }
    (folder / "profile.json").write_text(json.dumps(content))
    write_manifest(folder, stage="profile", settings={}, parent=model)
    return folder


def write_evaluation(folder: Path, weights: str | None) -> Path:
    folder.mkdir()
    content = {
        "schema": 1,
        "images": 1000,
        "subject": {"weights_sha256": weights, "sampler": "ddim", "steps": 25, "guidance": 1.5},
        "extractor": {"name": "fashion-mnist"},
        "metrics": {"frechet": {"value": 12.34, "low": 11.0, "high": 13.0}, "recall": {"value": None}},
        "pairs": {"measures": {"psnr": {"mean": {"value": 27.5, "low": None, "high": None}}}},
        "cost": {"ratio": {"value": 0.52}},
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_what_was_measured_is_shown(model: Path, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "p", model)
    evaluation = write_evaluation(tmp_path / "v", read_manifest(model)["weights_sha256"])
    exported(model, tmp_path / "e", measured=(str(profile), str(evaluation)))
    card = (tmp_path / "e" / "README.md").read_text()
    assert "| attention and MLP MACs | 0.512 of the static model's |" in card
    assert "0.610 of the static model's (95 % interval 0.590 to 0.630)" in card
    assert "on cpu (x86_64, 1 threads), float32" in card
    assert "| Fréchet distance | 12.34 (11 to 13) |" in card
    assert "| PSNR against the static model | 27.5 |" in card
    assert "recall" not in card
    assert "Of 1000 images, ddim sampler, 25 steps, guidance 1.5, features of fashion-mnist" in card
    assert card.index("## Measured") < card.index("## Use")


def test_another_models_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", in_channels=1, always_on=False)
    assert read_manifest(other)["weights_sha256"] != read_manifest(model)["weights_sha256"]
    for folder in (write_profile(tmp_path / "p", other), write_evaluation(tmp_path / "v", "0" * 64)):
        with pytest.raises(DyditError, match="of another model"):
            exported(model, tmp_path / "e", measured=(str(folder),))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("kind", "settings"), [("static", {}), ("pruned", {"timestep": 500})])
def test_static_models_do_not_boast_of_the_dynamic_ones_numbers(
    kind: str, settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path / "p", model)
    with pytest.raises(DyditError, match="takes no --measured"):
        exported(model, tmp_path / "e", kind, measured=(str(profile),), **settings)
    assert not (tmp_path / "e").exists()


def test_a_pipeline_folder_knows_its_weights_too(model: Path, tmp_path: Path) -> None:
    exported(model, tmp_path / "e")
    assert read_manifest(tmp_path / "e")["weights_sha256"] is None
    own, other = weights_hash(tmp_path / "e" / "transformer"), "0" * 64
    evaluation = write_evaluation(tmp_path / "v", other)
    settings = ExportSection(model=str(tmp_path / "e"), out=tmp_path / "again", measured=(str(evaluation),))
    with pytest.raises(DyditError, match="of another model"):
        opened(settings)
    source, _ = opened(
        settings.model_copy(update={"measured": (str(write_evaluation(tmp_path / "w", own)),)})
    )
    assert source.path == tmp_path / "e"


def test_where_nothing_was_measured(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="Nothing was measured"):
        exported(model, tmp_path / "e", measured=(str(tmp_path / "nowhere"),))
