"""Under which licence a checkpoint was published, from the files that came with it; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dydit_cli.checkpoints.terms import front_matter, recognised, terms_of

CARD = "---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md\n---\n\n# FLUX\n"


def test_a_card_names_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "transformer").mkdir()
    weights = tmp_path / "flux.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    for path in (tmp_path, tmp_path / "transformer", weights):
        found = terms_of(path)
        assert (found.license, found.name, found.link) == ("other", "flux-1-dev", "LICENSE.md")
        assert found.said_by == str(tmp_path / "README.md")


def test_a_file_names_it_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"modelspec.license": "cc-by-nc-4.0"})
    assert terms_of(path).license == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("MIT License\n\nPermission is hereby granted, free of charge, to any person", "mit"),
        ("                 Apache License\n           Version 2.0, January 2004", "apache-2.0"),
        ("Creative Commons\n\nAttribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("# FLUX.1 [dev] Non-Commercial License v1.1.1", None),
    ],
)
def test_a_text_is_recognised(text: str, identifier: str | None, tmp_path: Path) -> None:
    assert recognised(text) == identifier
    (tmp_path / "LICENSE").write_text(text)
    found = terms_of(tmp_path)
    assert found.license == (identifier or "other")
    assert found.name == (None if identifier else "FLUX.1 [dev] Non-Commercial License v1.1.1")


def test_a_text_beside_a_single_file_may_belong_to_anything(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge")
    (tmp_path / "README.md").write_text("# A project of mine\n")
    (tmp_path / "DiT.pt").write_bytes(b"")
    assert terms_of(tmp_path / "DiT.pt").as_json() == {}


def test_the_cache_of_the_hub_tells_the_repository(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--facebook--DiT-XL-2-256" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    assert terms_of(folder).repository == "facebook/DiT-XL-2-256"
    assert terms_of(tmp_path).repository is None
    assert terms_of(tmp_path, "a/b").repository == "a/b"


@pytest.mark.parametrize("text", ["", "# No head\n", "---\n[not: yaml\n---\n", "---\n- a list\n---\n"])
def test_what_is_no_head(text: str) -> None:
    assert front_matter(text) == {}
