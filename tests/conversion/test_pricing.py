"""`dydit plan`'s figures: from shapes alone, and those of the model that a conversion makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from dydit_cli.artifacts.tensor_files import write_header
from dydit_cli.checkpoints import Checkpoint, open_checkpoint
from dydit_cli.checkpoints.layout import Rearranged
from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily
from dydit_cli.conversion.convert import convert
from dydit_cli.conversion.pricing import price
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Hints
from dydit_cli.families.original_flux import to_original

CASES = Path(__file__).parent.parent / "parity"
DIT = CASES / "dit_tiny" / "checkpoint.pt"


class Unreadable(LazyTensors):
    """Shapes without numbers: whoever reads one fails."""

    def __init__(self, specs: dict[str, TensorSpec]) -> None:
        self._known = specs

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._known:
            raise KeyError(key)
        raise AssertionError(f"{key} was read")

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def spec(self, key: str) -> TensorSpec:
        return self._known[key]

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        raise AssertionError(f"{key} was read")


def flux_dev(**changes: object) -> Checkpoint:
    """The header of the published file, in bf16."""
    with torch.device("meta"):
        state = FluxTransformer2DModel(**({"guidance_embeds": True} | changes)).state_dict()
    original = Rearranged(state, to_original(lazily(state).specs)).specs
    specs = {key: TensorSpec(spec.shape, torch.bfloat16) for key, spec in original.items()}
    return Checkpoint(Path("flux1-dev.safetensors"), Unreadable(specs), "", "safetensors")


class TestFluxDev:
    def test_from_names_and_shapes_alone(self) -> None:
        found = price(flux_dev(), ratio=0.7)
        assert found.family == "flux"
        assert found.params["static"] == 11_901_408_320
        assert found.bytes.source == 2 * 11_901_408_320
        # The authors' token routers would add 1.74 billion to the eight billion of FLUX-lite.
        assert 0 < found.params["routers"] < 0.01 * found.params["static"]
        assert found.bytes.converted > found.bytes.source + 4 * found.params["routers"]
        # 512 tokens of 4096 numbers and 768 pooled ones; 16 channels of 128 x 128, mean and variance.
        assert found.bytes.caption == 4 * (512 * 4096 + 768)
        assert found.bytes.sample == 2 * 4 * 16 * 128 * 128

    def test_macs_at_a_ratio(self) -> None:
        gmacs = price(flux_dev(), ratio=0.7).gmacs
        assert gmacs.dynamic == pytest.approx(gmacs.static - 0.3 * gmacs.routed + gmacs.routers)
        assert price(flux_dev(), ratio=1.0).gmacs.dynamic == pytest.approx(gmacs.static + gmacs.routers)
        # 2 * 4 * (N + T) C^2 ... : the blocks' matrices alone, once for each of 4,608 tokens.
        weights = 38 * (4 * 3072**2 + 2 * 3072 * 12288) + 19 * (4 * 3072**2 + 2 * 3072 * 12288)
        attention = 57 * 2 * 4608**2 * 3072
        assert gmacs.routed == pytest.approx((4608 * weights + attention) / 1e9, rel=1e-6)

    def test_a_header_on_disk(self, tmp_path: Path) -> None:
        """A file of a few GB that is all holes."""
        specs = lazily(flux_dev(num_layers=1, num_single_layers=1).tensors).specs
        with (tmp_path / "a.safetensors").open("wb") as file:
            write_header(file, specs)
        found = price(open_checkpoint(tmp_path / "a.safetensors"))
        assert found.params["static"] == sum(spec.numel for spec in specs.values())
        assert (found.config["num_layers"], found.config["num_single_layers"]) == (1, 1)

    def test_authors_routers_are_counted_as_such(self) -> None:
        path = CASES / "dyflux_official_tiny" / "checkpoint.pt"
        found = price(open_checkpoint(path), hints=Hints(axes_dims_rope=(4, 6, 6)))
        assert found.dynamic
        assert found.params["total"] == 550_100
        # Attention is never skipped by routers of tokens, so that half cannot be reached.
        assert found.gmacs.ratio == found.gmacs.ratio_floor > 0.5


class TestDit:
    def test_what_a_conversion_reports(self, tmp_path: Path) -> None:
        found = price(open_checkpoint(DIT), family="dit", hints=Hints(num_heads=4))
        report = convert(DIT, out=tmp_path / "c", family="dit", num_heads=4)
        assert {key: found.params[key] for key in ("static", "routers", "total")} == report.params
        assert found.gmacs.static == pytest.approx(report.static_gmacs)
        assert found.gmacs.ratio_floor == pytest.approx(report.ratio_floor)
        written = (tmp_path / "c" / "diffusion_pytorch_model.safetensors").stat().st_size
        # The file has a header besides.
        assert found.bytes.converted < written < found.bytes.converted + 20_000
        assert found.bytes.caption == 0


class TestMistakes:
    @pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
    def test_no_share(self, ratio: float) -> None:
        with pytest.raises(DyditError, match="not possible"):
            price(open_checkpoint(DIT), family="dit", hints=Hints(num_heads=4), ratio=ratio)

    def test_below_the_floor(self) -> None:
        with pytest.raises(DyditError, match=r"0\.092"):
            price(open_checkpoint(DIT), family="dit", hints=Hints(num_heads=4), ratio=0.05)

    def test_two_families(self) -> None:
        with pytest.raises(DyditError, match="--family dit or --family sit"):
            price(open_checkpoint(DIT))
