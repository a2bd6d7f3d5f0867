"""File, overrides and options together; and every mistake at once, each with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dydit_cli.errors import DyditError
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import (
    ConvertSection,
    ExportSection,
    FinetuneSection,
    ProfileSection,
    SampleSection,
)

GOOD = """\
schema: 1
description: a small one
convert:
  checkpoint: a.pt
  out: runs/c
finetune:
  data: images
  out: runs/t
  steps: 10
  learning_rate: 1e-3
  mixed_precision: no
sample:
  out: runs/s
  classes: [0, 1]
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def refusal(*arguments: object, **options: object) -> DyditError:
    with pytest.raises(DyditError) as caught:
        load_recipe(*arguments, **options)
    return caught.value


def lines(error: DyditError) -> list[str]:
    """The mistakes of an error, with the folder of the test (which is the working folder) taken off."""
    found = error.what.replace(f"{Path.cwd()}/", "").splitlines()
    return [line.strip() for line in (found[1:] if len(found) > 1 else found)]


def test_a_recipe_is_read(write: Write) -> None:
    recipe = load_recipe(write(GOOD), stage="finetune")
    section = recipe.get(FinetuneSection)
    assert section is not None
    assert (section.steps, section.learning_rate, section.mixed_precision) == (10, 1e-3, "no")
    assert recipe.name == "r"
    assert recipe.description == "a small one"
    assert recipe.get(ExportSection) is None


def test_a_stage_takes_the_out_of_the_stage_before(write: Write) -> None:
    recipe = load_recipe(write(GOOD), stage="sample")
    assert recipe.sections["finetune"].model == "runs/c"
    assert recipe.sections["sample"].model == "runs/t"


def test_without_a_finetune_section_the_converted_model_is_taken(write: Write) -> None:
    path = write("schema: 1\nconvert: {checkpoint: a.pt, out: runs/c}\n")
    assert load_recipe(path, ["out=s"], "sample").sections["sample"].model == "runs/c"


def test_a_given_model_or_preset_is_not_replaced(write: Write) -> None:
    assert load_recipe(write(GOOD), ["model=mine"], "sample").sections["sample"].model == "mine"
    profile = load_recipe(write(GOOD), ["preset=dit-xl/2"], "profile").get(ProfileSection)
    assert profile is not None
    assert profile.model is None


def test_the_chain_follows_overrides_of_other_sections(write: Write) -> None:
    recipe = load_recipe(write(GOOD), ["finetune.out=runs/other"], "sample")
    assert recipe.sections["sample"].model == "runs/other"


def test_nearer_to_the_user_wins(write: Write) -> None:
    path = write(GOOD)
    assert load_recipe(path, ["steps=20"], "finetune").sections["finetune"].steps == 20
    assert load_recipe(path, ["finetune.steps=20", "steps=30"], "finetune").sections["finetune"].steps == 30
    assert load_recipe(path, [], "finetune", {"steps": 40}).sections["finetune"].steps == 40


def test_overrides_read_lists_null_and_dashes(write: Write) -> None:
    overrides = ["classes=[2, 3]", "num-images=5", "sample.sampler=null"]
    sample = load_recipe(write(GOOD + "  sampler: ddim\n"), overrides, "sample").get(SampleSection)
    assert sample is not None
    assert (sample.classes, sample.num_images, sample.sampler) == ((2, 3), 5, None)


def test_no_recipe_is_needed() -> None:
    recipe = load_recipe(None, ["checkpoint=a.pt"], "convert", {"out": Path("c"), "num_heads": 8})
    assert recipe.sections["convert"] == ConvertSection(checkpoint="a.pt", out=Path("c"), num_heads=8)
    assert recipe.source is None


def test_the_resolved_recipe_reads_back_to_the_same(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write(GOOD + "export:\n"), ["steps=7"], "finetune", {"out": Path("t")})
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml", stage="finetune")
    assert again.sections == recipe.sections
    assert again.name == recipe.name
    assert again.to_yaml() == recipe.to_yaml()
    # The export section lacks its `out`: another stage's business, kept as it was written.
    assert again.incomplete == recipe.incomplete == {"export": {"model": "t"}}


def test_how_a_run_was_started_is_no_part_of_its_recipe(write: Write) -> None:
    """A run started with --overwrite is resumed from its own recipe."""
    text = load_recipe(write(GOOD), ["sample.overwrite=true"], "finetune", {"overwrite": True}).to_yaml()
    again = load_recipe(write(text), [], "finetune", {"resume": True})
    assert again.sections["finetune"].resume
    assert not again.sections["sample"].overwrite


def test_all_mistakes_come_at_once_each_with_its_line(write: Write) -> None:
    path = write("""\
schema: 1
nam: x
steps: 3
finetun: {}
finetune:
  model: c
  data: d
  out: t
  step: 3
  steps: many
  target_ratio: 1.5
  guidance: 3
  mixed_precision: bf61
  target_ratio: 0.2
  seed: {a: 1}
  learning_rate: !!python/name:os.system x
convert: [1]
""")
    found = lines(refusal(path, ["stepz=3", "sampel.steps=4", "seed=", "classes=3"], "finetune"))
    assert found == [
        "r.yaml:2: nam: unknown key, did you mean 'name'?",
        "r.yaml:3: steps: unknown key here; it is a key of prepare, finetune, sample, evaluate and export",
        "r.yaml:4: finetun: unknown key, did you mean 'finetune'?",
        "r.yaml:9: finetune.step: unknown key, did you mean 'steps'?",
        "r.yaml:10: finetune.steps: must be a whole number, got 'many'",
        "r.yaml:11: finetune.target_ratio: must be at most 1, got '1.5'",
        "r.yaml:12: finetune.guidance: unknown key here; it is a key of prepare, sample and evaluate",
        "r.yaml:13: finetune.mixed_precision: must be 'no', 'bf16' or 'fp16', got 'bf61', did you mean 'bf16'?",
        "r.yaml:14: finetune.target_ratio: written twice; the first is in line 11",
        "r.yaml:15: finetune.seed: must be a single value or a list of single values",
        "r.yaml:16: finetune.learning_rate: YAML tags are not used in recipes, got !!python/name:os.system",
        "r.yaml:17: convert: must hold indented `key: value` lines",
        "command line: stepz=3: unknown key, did you mean 'steps'?",
        "command line: sampel.steps=4: unknown section, did you mean 'sample'?",
        "command line: seed=: has no value; write `null` for none",
        "command line: classes=3: unknown key here; it is a key of sample and evaluate",
    ]


def test_a_missing_key_is_the_running_stages_mistake_alone(write: Write) -> None:
    path = write("schema: 1\nconvert:\n  checkpoint: a.pt\nfinetune:\n  model: c\n")
    assert lines(refusal(path, stage="convert")) == [
        "r.yaml:2: convert.out: required key is missing; give --out VALUE or out=VALUE"
    ]
    assert lines(refusal(path)) == [
        "r.yaml:2: convert.out: required key is missing",
        "r.yaml:4: finetune.data: required key is missing",
        "r.yaml:4: finetune.out: required key is missing",
        "r.yaml:4: finetune.steps: required key is missing",
    ]


def test_a_wrong_value_in_another_section_is_reported(write: Write) -> None:
    path = write(GOOD + "  steps: 0\n")
    assert lines(refusal(path, stage="finetune")) == ["r.yaml:15: sample.steps: must be at least 1, got '0'"]


def test_rules_between_keys_name_the_section(write: Write) -> None:
    path = write(GOOD + "profile:\n  model: a\n  preset: b\n")
    assert lines(refusal(path)) == ["r.yaml:15: profile: needs either a model folder or a preset, not both"]


def test_an_option_and_an_override_of_one_key_contradict(write: Write) -> None:
    error = refusal(write(GOOD), ["steps=3"], "finetune", {"steps": 4})
    assert "given twice, as --steps and as steps=…" in error.what


def test_a_wrong_option_is_reported_with_the_rest(write: Write) -> None:
    error = refusal(write(GOOD), ["seed=x"], "finetune", {"target_ratio": 2.0})
    assert lines(error) == [
        "command line: finetune.target_ratio: must be at most 1, got 2.0",
        "command line: finetune.seed: must be a whole number, got 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no `key: value` lines"),
        ("# nothing\n", "holds no `key: value` lines"),
        ("- a\n", "no mapping"),
        ("just words\n", "no mapping"),
        ("schema: 1\nconvert: [\n", "r.yaml:3: not valid YAML"),
        ("schema: 1\nconvert:\n  a: b: c\n", "r.yaml:3: not valid YAML"),
        ("schema: 1\n\tconvert: 1\n", "r.yaml:2: not valid YAML"),
        ("schema: 1\nname: \x07\n", "r.yaml:2: not valid YAML"),
        ("schema: 1\n---\nschema: 1\n", "not valid YAML"),
        ("schema: 2\nwhatever: 1\n", "r.yaml:1: schema: version 2 is newer"),
        ("schema: one\n", "r.yaml:1: schema: must be 1, got 'one'"),
        ("name: a\n", "r.yaml:1: schema: required key is missing; write `schema: 1`"),
        ("schema: 1\n? [a]\n: b\n", "a key must be a single word"),
        ("schema: 1\nname: [a]\n", "r.yaml:2: name: must be a single value"),
        ("schema: 1\nsample: {classes: [[1]]}\n", "must be a single value or a list"),
        ("&a\nschema: 1\nsample: *a\n", "sample.sample: unknown key"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_file_of_the_wrong_form(write: Write, text: str, said: str) -> None:
    assert said in str(refusal(write(text)))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"schema: 1\nname: \xff\n")
    assert "Line 2 holds bytes that are not UTF-8" in refusal(tmp_path / "r.yaml").why


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfschema: 1\n")
    assert load_recipe(tmp_path / "r.yaml").sections == {}


def test_a_checkpoint_given_as_recipe_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"\0" * 1_000_001)
    assert "larger than a megabyte" in refusal(tmp_path / "a.pt").why


def test_a_folder_given_as_recipe(tmp_path: Path) -> None:
    assert "folder" in refusal(tmp_path).why


def test_an_empty_section_means_its_defaults(write: Write) -> None:
    assert load_recipe(write(GOOD + "profile:\n")).sections["profile"] == ProfileSection(model="runs/t")


def test_quoted_words_stay_words(write: Write) -> None:
    path = write('schema: 1\nconvert:\n  checkpoint: "null"\n  out: 007\n')
    assert load_recipe(path).sections["convert"] == ConvertSection(checkpoint="null", out=Path("007"))
