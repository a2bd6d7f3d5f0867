"""The Inception network with random weights: its layout, its two resizings, and what it refuses.

The published weights' files are not part of the repository, so that the layout is checked against what is known of it without
them: its keys and shapes as both ports name them, its numbers of tensors and parameters, its intermediate sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.extractors.inception import open_inception
from dydit_cli.evaluation.extractors.inception_network import InceptionNetwork
from dydit_cli.evaluation.extractors.resizing import prepared, tensorflow_bilinear

CPU = torch.device("cpu")
TORCHVISION_PARAMETERS = 27_161_264
"""Of torchvision's `inception_v3`, as its documentation gives them."""
AUXILIARY_PARAMETERS = 3_326_696
KNOWN_SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7dbl_5.conv.weight": (192, 128, 1, 7),
    "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
    "Mixed_7c.branch_pool.bn.running_var": (192,),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


@pytest.fixture(scope="module")
def network() -> InceptionNetwork:
    """Random weights with statistics that differ from the defaults."""
    torch.manual_seed(0)
    made = InceptionNetwork()
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network: InceptionNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_the_layout_is_the_published_one(network: InceptionNetwork) -> None:
    state = network.state_dict()
    for name, shape in KNOWN_SHAPES.items():
        assert tuple(state[name].shape) == shape
    convolutions = [name for name in state if name.endswith(".conv.weight")]
    assert len(convolutions) == 94
    assert len([name for name in state if not name.endswith("num_batches_tracked")]) == 94 * 5 + 2
    classifier = 2049 * 1008 - 2049 * 1000
    expected = TORCHVISION_PARAMETERS - AUXILIARY_PARAMETERS + classifier
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_the_maps_have_their_sizes(network: InceptionNetwork) -> None:
    sizes = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: sizes.__setitem__(name, tuple(output.shape[1:]))
        )
        for name, module in network.named_children()
        if name != "fc"
    ]
    pooled, spatial, logits = network(torch.zeros(1, 3, 299, 299))
    for handle in handles:
        handle.remove()
    assert sizes["Conv2d_2b_3x3"] == (64, 147, 147)
    assert sizes["Conv2d_4a_3x3"] == (192, 71, 71)
    assert sizes["Mixed_5d"] == (288, 35, 35)
    assert sizes["Mixed_6e"] == (768, 17, 17)
    assert sizes["Mixed_7c"] == (2048, 8, 8)
    assert (pooled.shape, spatial.shape, logits.shape) == ((1, 2048), (1, 2023), (1, 1008))


def reference_block(
    state: dict[str, Tensor], prefix: str, x: Tensor, paddings: tuple[int, int] = (0, 0)
) -> Tensor:
    """One normalised convolution by the formula."""
    y = F.conv2d(x, state[f"{prefix}.conv.weight"], padding=paddings)
    mean, variance = state[f"{prefix}.bn.running_mean"], state[f"{prefix}.bn.running_var"]
    scale = state[f"{prefix}.bn.weight"] / (variance + 0.001).sqrt()
    y = (y - mean[:, None, None]) * scale[:, None, None] + state[f"{prefix}.bn.bias"][:, None, None]
    return y.clamp(min=0)


@pytest.mark.parametrize("name", ["Mixed_7b", "Mixed_7c"])
def test_the_last_blocks_pool_as_the_graph_does(network: InceptionNetwork, name: str) -> None:
    """The average leaves the border out of the mean; the last block takes the maximum instead."""
    channels = {"Mixed_7b": 1280, "Mixed_7c": 2048}[name]
    x = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.3
    state = {
        key.removeprefix(f"{name}."): value
        for key, value in network.state_dict().items()
        if key.startswith(name)
    }
    pooled = torch.empty_like(x)
    for i in range(4):
        for j in range(4):
            window = x[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            pooled[:, :, i, j] = window.mean(dim=(2, 3)) if name == "Mixed_7b" else window.amax(dim=(2, 3))
    middle = reference_block(state, "branch3x3_1", x)
    double = reference_block(state, "branch3x3dbl_2", reference_block(state, "branch3x3dbl_1", x), (1, 1))
    expected = torch.cat(
        [
            reference_block(state, "branch1x1", x),
            reference_block(state, "branch3x3_2a", middle, (0, 1)),
            reference_block(state, "branch3x3_2b", middle, (1, 0)),
            reference_block(state, "branch3x3dbl_3a", double, (0, 1)),
            reference_block(state, "branch3x3dbl_3b", double, (1, 0)),
            reference_block(state, "branch_pool", pooled),
        ],
        dim=1,
    )
    torch.testing.assert_close(network.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-5)


def test_the_parts_are_where_adm_reads_them(network: InceptionNetwork) -> None:
    seen = {}
    block = network.get_submodule("Mixed_6d").get_submodule("branch1x1")
    handle = block.register_forward_hook(lambda _module, _inputs, output: seen.__setitem__("conv", output))
    images = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pooled, spatial, logits = network(images)
    handle.remove()
    # TensorFlow's order of axes: position, then channel.
    assert torch.equal(spatial.view(17, 17, 7)[3, 5], seen["conv"][0, :7, 3, 5])
    torch.testing.assert_close(logits, F.linear(pooled, network.fc.weight))


def test_tensorflows_resizing_pixel_by_pixel() -> None:
    images = torch.randint(256, (1, 2, 5, 7), generator=torch.Generator().manual_seed(0)).float()
    for size in (3, 11):
        found = tensorflow_bilinear(images, size).numpy()
        source = images.numpy()
        expected = np.empty((1, 2, size, size))
        for i in range(size):
            for j in range(size):
                y, x = i * 5 / size, j * 7 / size
                top, left = int(y), int(x)
                below, right = min(top + 1, 4), min(left + 1, 6)
                upper = source[..., top, left] * (1 - (x - left)) + source[..., top, right] * (x - left)
                lower = source[..., below, left] * (1 - (x - left)) + source[..., below, right] * (x - left)
                expected[..., i, j] = upper * (1 - (y - top)) + lower * (y - top)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_two_resizings_differ_and_scale_alike() -> None:
    images = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = prepared(images, "tensorflow"), prepared(images, "pytorch-fid")
    assert ours.shape == theirs.shape == (1, 3, 299, 299)
    assert float((ours - theirs).abs().max()) > 0.1
    white = torch.full((1, 32, 32, 1), 255, dtype=torch.uint8)
    assert float(prepared(white, "tensorflow").max()) == pytest.approx(127 / 128)
    assert float(prepared(white, "pytorch-fid").max()) == pytest.approx(1)


def test_a_file_is_read_and_names_its_resizing(weights: Path, tmp_path: Path) -> None:
    extractor = open_inception(weights, "auto", CPU)
    assert extractor.resize == "tensorflow"
    assert len(extractor.sha256) == 64
    renamed = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    # Older files have no counters of batches.
    state = torch.load(weights, weights_only=True)
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, renamed)
    assert open_inception(renamed, "auto", CPU).resize == "pytorch-fid"
    assert open_inception(renamed, "tensorflow", CPU).resize == "tensorflow"
    image = torch.randint(256, (1, 20, 20, 3), dtype=torch.uint8)
    features = extractor.features(image)
    expected = extractor.network(prepared(image, "tensorflow"))
    assert torch.equal(features.pooled, expected[0])


def test_a_missing_file_names_what_to_bring() -> None:
    with pytest.raises(DyditError) as caught:
        open_inception(Path("nowhere.pth"), "auto", CPU)
    assert "nowhere.pth" in caught.value.what
    assert "pt_inception-2015-12-05-6726825d.pth" in caught.value.fix
    assert "weights-inception-2015-12-05-6726825d.pth" in caught.value.fix


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["fc.weight"] = torch.zeros(1000, 2048)
    state["AuxLogits.conv0.conv.weight"] = torch.zeros(128, 768, 1, 1)
    path = tmp_path / "inception_v3_google.pth"
    torch.save(state, path)
    with pytest.raises(DyditError) as caught:
        open_inception(path, "auto", CPU)
    assert "AuxLogits" in caught.value.why
    assert "torchvision's ImageNet classifier" in caught.value.why
    del state["AuxLogits.conv0.conv.weight"], state["Mixed_6a.branch3x3.bn.bias"]
    torch.save(state, path)
    with pytest.raises(DyditError, match="1 missing"):
        open_inception(path, "auto", CPU)
