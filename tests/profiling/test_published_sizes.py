"""The formula at the published sizes of video and text-to-image models, whole: shapes alone, on torch's meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.registry import preset_named
from dydit_cli.profiling.counting import count_static


class ConvolutionOfZeros(nn.Module):
    """The patch embedding on numbers that exist: a trace of a convolution without any fails in torch's shape function."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight  # which models ask for its type and device
        # In a list, so that these are no parameters of the model.
        self.hidden = [copy.deepcopy(convolution).to_empty(device="cpu").requires_grad_(False)]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.hidden[0](torch.zeros(inputs.shape)).to("meta")


def published(name: str) -> DynamicModel:
    family, config = preset_named(name)
    with torch.device("meta"):
        model = family.build(config).eval()
    for module in list(model.modules()):
        if isinstance(getattr(module, "proj", None), nn.Conv2d):
            module.proj = ConvolutionOfZeros(module.proj)
    return model


@pytest.mark.parametrize(
    ("name", "time", "gmacs", "without_layernorm"),
    [
        # 28 blocks on 16 frames of 256 tokens.
        ("latte-xl/2-ucf101", 500.0, 1863.901, 1862.825),
        # 28 blocks of either kind on 16 frames of 1,024 tokens, with 120 tokens of text.
        ("latte-t2v-1", 500.0, 17074.271, 17065.740),
        # 19 + 38 blocks on 4,096 tokens of an image and 512 of text.
        ("flux-dev", 0.5, 37196.680, 37192.327),
    ],
)
def test_both_counters_give_the_formula(
    name: str, time: float, gmacs: float, without_layernorm: float
) -> None:
    model = published(name)
    sample, condition = model.example_inputs(1, 0)
    counted = count_static(
        model, sample.to("meta"), torch.tensor([time], device="meta"), condition.to("meta")
    )
    assert counted.deviation < 1e-6
    assert counted.fvcore == pytest.approx(gmacs * 1e9, rel=1e-6)
    assert counted.torch == pytest.approx(without_layernorm * 1e9, rel=1e-6)
