"""LPIPS and CLIP from local files with random weights, summaries, conditions and sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dydit_cli.errors import DyditError
from dydit_cli.evaluation.conditions import read_condition
from dydit_cli.evaluation.pairs.clip_score import open_clip, read_prompts
from dydit_cli.evaluation.pairs.comparison import measure_pairs
from dydit_cli.evaluation.pairs.lpips import CONVOLUTIONS, open_lpips
from dydit_cli.evaluation.pairs.sheets import write_sheet
from tests.evaluation.sources import pictures

CPU = torch.device("cpu")


@pytest.fixture
def lpips_folder(tmp_path: Path) -> Path:
    """Random weights under the published names; AlexNet's file has a classifier as well."""
    folder = tmp_path / "lpips"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    trunk = {"classifier.6.bias": torch.zeros(1000)}
    heads = {}
    for index, (key, after, before, kernel, *_) in enumerate(CONVOLUTIONS):
        fan = before * kernel * kernel
        trunk[f"{key}.weight"] = torch.randn(after, before, kernel, kernel, generator=generator) / fan**0.5
        trunk[f"{key}.bias"] = 0.1 * torch.randn(after, generator=generator)
        heads[f"lin{index}.model.1.weight"] = torch.rand(1, after, 1, 1, generator=generator)
    torch.save(trunk, folder / "alexnet-owt-7be5be79.pth")
    torch.save(heads, folder / "alex.pth")
    return folder


def test_lpips_is_the_papers_formula(lpips_folder: Path) -> None:
    """Written a second time, from the description: AlexNet's five ReLUs, unit length, weighted squares, means."""
    trunk = torch.load(lpips_folder / "alexnet-owt-7be5be79.pth", weights_only=True)
    heads = torch.load(lpips_folder / "alex.pth", weights_only=True)
    first, second = pictures(2, 1, 64), pictures(2, 2, 64)

    def maps(images: torch.Tensor) -> list[torch.Tensor]:
        x = images.permute(0, 3, 1, 2).double() / 255 * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 11, 4, 2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(3, 2),
            torch.nn.Conv2d(64, 192, 5, padding=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(3, 2),
            torch.nn.Conv2d(192, 384, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(384, 256, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(256, 256, 3, padding=1),
            torch.nn.ReLU(),
        )
        layers.load_state_dict({k.removeprefix("features."): v for k, v in trunk.items() if "features" in k})
        found = []
        for layer in layers.double():
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                found.append(x)
        return found

    expected = torch.zeros(2, dtype=torch.float64)
    for index, (left, right) in enumerate(zip(maps(first), maps(second), strict=True)):
        apart = (F.normalize(left, dim=1) - F.normalize(right, dim=1)).square()
        weights = heads[f"lin{index}.model.1.weight"].double()[0]
        expected += (apart * weights).sum(dim=1).mean(dim=(1, 2)).detach()
    measured = open_lpips(lpips_folder, CPU)
    torch.testing.assert_close(measured.distances(first, second), expected, rtol=1e-4, atol=1e-5)
    assert measured.distances(first, first).tolist() == [0, 0]
    with pytest.raises(DyditError, match="16x16"):
        measured.distances(pictures(1, 1, 16), pictures(1, 2, 16))


def test_lpips_says_what_to_bring(lpips_folder: Path) -> None:
    with pytest.raises(DyditError, match="does not hold LPIPS"):
        open_lpips(Path("nowhere"), CPU)
    (lpips_folder / "alex.pth").rename(lpips_folder.parent / "alex.pth")
    with pytest.raises(DyditError, match="linear heads") as caught:
        open_lpips(lpips_folder, CPU)
    assert "alexnet-owt-7be5be79.pth" in caught.value.fix
    # The heads of another trunk, say VGG's.
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, lpips_folder / "vgg.pth")
    with pytest.raises(DyditError, match=r"lin1\.model"):
        open_lpips(lpips_folder, CPU)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights and a tokenizer made in code."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("clip")
    words = ["[PAD]", "[UNK]", "a", "shirt", "shoe", "[EOS]"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 5)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes
        | {"vocab_size": 6, "max_position_embeddings": 8, "eos_token_id": 5, "pad_token_id": 0},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_the_clip_score_is_a_cosine(clip_folder: Path) -> None:
    clip = open_clip(clip_folder, CPU)
    images = pictures(3, 1, 24)
    prompts = ["a shirt", "a shoe", "a shirt a shoe"]
    scores = clip.scores(images, prompts)
    assert scores.shape == (3,)
    assert bool(((scores >= 0) & (scores <= 100)).all())
    # Alone or together, which would differ if padding were seen.
    alone = torch.cat([clip.scores(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)


def test_clip_says_what_to_bring(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="no CLIP model") as caught:
        open_clip(tmp_path, CPU)
    assert "--clip" in caught.value.fix


def test_prompts_by_image_or_class(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("zero\none\n\n")
    assert read_prompts(file, [1, 0, 1], 3) == ["one", "zero", "one"]
    assert read_prompts(file, None, 2) == ["zero", "one"]
    with pytest.raises(DyditError, match="2 prompts for 3 images"):
        read_prompts(file, None, 3)


def test_summaries_and_order() -> None:
    first = pictures(5, 1, 16)
    second = first.clone()
    second[2] = 255 - second[2]
    second[4, 0, 0, 0] ^= 8
    found = measure_pairs(first, second)
    summary = found.summaries()["psnr"]
    assert summary.best == 100
    assert summary.worst == float(found.values["psnr"][2])
    assert summary.median == 100
    assert found.from_worst_to_best()[:2] == [2, 4]


def test_videos_are_pairs_of_their_frames() -> None:
    first, second = pictures(2, 1, 12, frames=3), pictures(2, 2, 12, frames=3)
    by_frame = measure_pairs(first.flatten(0, 1), second.flatten(0, 1)).values["ssim"]
    found = measure_pairs(first, second)
    assert found.count == 2
    torch.testing.assert_close(found.values["ssim"], by_frame.view(2, 3).mean(dim=1))


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("psnr<25", 24.9, True),
        ("psnr<25", 25.0, False),
        ("psnr <= 25", 25.0, True),
        ("ssim.worst<0.8", 0.7, True),
        ("fid>30", 31.0, True),
        ("lpips>=1e-1", 0.05, False),
    ],
)
def test_conditions(text: str, value: float, holds: bool) -> None:
    condition = read_condition(text)
    assert condition.holds({condition.key: value}) is holds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("psnr", "has the form"),
        ("psrn<3", "did you mean 'psnr'"),
        ("psnr.wrost<3", "worst"),
        ("frechet.worst<3", "no parts"),
        ("psnr<1e", "not a number"),
        ("psnr<25; rm", "has the form"),
    ],
)
def test_conditions_that_are_none(text: str, said: str) -> None:
    with pytest.raises(DyditError) as caught:
        read_condition(text)
    assert said in str(caught.value)


def test_a_condition_on_what_was_not_measured_does_not_pass() -> None:
    with pytest.raises(DyditError, match="cannot be judged"):
        read_condition("psnr<25").holds({"frechet": 3.0})


@pytest.mark.parametrize(("channels", "side", "frames"), [(1, 28, None), (3, 300, None), (3, 16, 5)])
def test_sheets_show_both_images_and_the_difference(
    tmp_path: Path, channels: int, side: int, frames: int | None
) -> None:
    first, second = (pictures(4, seed, side, channels, frames) for seed in (1, 2))
    second[0] = first[0]
    values = measure_pairs(first, second).values
    write_sheet(tmp_path / "s.png", "Pairs", ("one", "other"), first, second, [0, 2, 1], values)
    with Image.open(tmp_path / "s.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[0] > 2 * min(side, 128)
    assert pixels.shape[1] > 6 * min(side, 128)
    # The first pair is identical: its difference is a black square.
    assert (pixels.reshape(-1, 3).sum(axis=1) == 0).sum() >= min(side, 256) ** 2
