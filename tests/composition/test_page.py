"""The code of docs/composing.md runs as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dydit_cli.export.registration import register
from tests.export.artifacts import exported, trained
from tests.test_docs import blocks


def test_the_examples_run(own_folder: Path, repository: Path) -> None:
    pytest.importorskip("torchao.quantization")
    register()
    exported(trained(own_folder / "runs" / "trained", in_channels=1), own_folder / "runs" / "pipeline")
    page = repository / "docs" / "composing.md"
    names: dict[str, Any] = {}
    for source in blocks(page, "python"):
        exec(compile(source, str(page), "exec"), names)
    model = names["pipeline"].transformer
    assert len(names["images"]) == 2
    assert not model.is_cache_enabled
    assert model.is_compiled
    assert type(names["transformer"].blocks[0].attn.qkv.weight).__name__ == "Int8Tensor"
    assert type(model.blocks[0].token_router.reduce.weight) is nn.Parameter
    assert model.dtype == torch.float32
