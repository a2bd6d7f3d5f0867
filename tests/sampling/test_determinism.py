"""--deterministic: one picture a seed, bit for bit, whatever the batch size; and the process's settings are as they were."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.sampling.determinism import CUBLAS_WORKSPACE, deterministic_kernels
from dydit_cli.sampling.generate import generate
from tests.tiny import bits, tiny_model


def pictures(model: DynamicTransformer, batch_size: int, num_images: int = 5) -> Tensor:
    made = generate(
        model,
        num_images=num_images,
        steps=4,
        batch_size=batch_size,
        seed=3,
        deterministic=True,
        classes=[1, 2],
    )
    return torch.cat([batch.samples for batch in made])


@pytest.mark.parametrize("execution", ["compact", "dense", "static"])
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_the_same_bits_whatever_the_batch_size(family: str, execution: str) -> None:
    model = tiny_model(family).set_execution(execution)
    alone = pictures(model, 1)
    for batch_size in (2, 5, 32):
        assert torch.equal(bits(pictures(model, batch_size)), bits(alone))
    # Nor do the other images of the run matter.
    assert torch.equal(bits(pictures(model, 4, num_images=2)), bits(alone[:2]))


def test_the_same_bits_in_half_precision() -> None:
    model = tiny_model("dit").to(torch.bfloat16).set_execution("compact")
    assert torch.equal(bits(pictures(model, 1)), bits(pictures(model, 5)))


def test_kernels_are_deterministic_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    seen = []
    for _ in generate(
        tiny_model("dit"),
        num_images=2,
        steps=2,
        deterministic=True,
        on_progress=lambda done: seen.append((done, torch.are_deterministic_algorithms_enabled())),
    ):
        # The caller of the generator decides for itself.
        assert not torch.are_deterministic_algorithms_enabled()
    assert (0.5, True) in seen
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS_WORKSPACE not in os.environ


def test_what_was_set_before_is_set_again_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(RuntimeError, match="in between"), deterministic_kernels():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise RuntimeError("in between")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ[CUBLAS_WORKSPACE] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
