"""The HTML report: true to the profile, complete in itself, and alive in a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dydit_cli.artifacts import save_model, write_manifest
from dydit_cli.cli.app import main
from dydit_cli.data.source import Source
from dydit_cli.objectives import objective_of
from dydit_cli.profiling.inputs import Inputs, NoiseSource
from dydit_cli.profiling.profile import ProfileReport, ProfileSettings, profile
from dydit_cli.profiling.token_maps import token_maps
from dydit_cli.reporting.content import SampleRow, Samples, gather
from dydit_cli.reporting.drawing import draw_samples
from dydit_cli.reporting.page import render, write_page
from dydit_cli.reporting.pictures import bits, png
from tests.tiny import tiny_model

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SETTINGS = ProfileSettings(images=6, timesteps=5, batch_size=6, latency_batch=1, repetitions=2)


@pytest.fixture(scope="module")
def profiled() -> tuple[Any, ProfileReport, Source]:
    """A tiny compact DiT, its profile, and what it saw."""
    model = tiny_model("dit").set_execution("compact")
    source = NoiseSource(model.geometry, 6, 0)
    report = profile(model, SETTINGS, inputs=Inputs(source, True, "D", "six samples"), trajectory_ratio=0.6)
    return model, report, source


@pytest.fixture(scope="module")
def page(profiled: tuple[Any, ProfileReport, Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all of its parts."""
    model, report, source = profiled
    folder = tmp_path_factory.mktemp("model")
    save_model(model, folder)
    settings = {"target_ratio": 0.5, "data": "</script><b>D", "steps": 3}
    write_manifest(folder, stage="finetune", settings=settings, results={"ratio": 0.5, "steps": 3})
    samples, _ = draw_samples(model, num_images=2, steps=2, classes=(0, 1))
    content = gather(
        report,
        model,
        folder=folder,
        maps=token_maps(model, source, objective_of(model), levels=4, images=2),
        samples=samples,
        models=[{"model": "a", "loss": "0.1"}, {"model": "b", "loss": "0.2"}],
        recipe_yaml="schema: 1\n",
    )
    return write_page(folder / "report.html", content)


def values(page: Path) -> dict[str, Any]:
    """The numbers of a page."""
    found = re.search(r'id="values">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_numbers_are_the_profiles(page: Path, profiled: tuple[Any, ProfileReport, Source]) -> None:
    _, report, _ = profiled
    said = values(page)
    assert np.allclose(said["profile"]["heads"], report.blocks.heads, atol=1e-4)
    rows = {row["name"]: row for row in said["cost"]}
    assert rows["attention and MLP"]["share"] == pytest.approx(report.ratio, abs=1e-4)
    assert rows["everything"]["share"] == pytest.approx(report.total_ratio, abs=1e-4)
    assert rows["target of fine-tuning"]["share"] == 0.5
    assert rows["along a sampler's way"]["share"] == 0.6
    assert report.latency is not None
    assert rows["time, compact"]["share"] == pytest.approx(report.latency.ratio, abs=1e-4)
    assert [row["group"] for row in said["cost"]] == ["claimed", *["counted"] * 5, *["measured"] * 3]


def test_units_are_what_the_routers_decide(page: Path, profiled: tuple[Any, ProfileReport, Source]) -> None:
    model, report, _ = profiled
    packed = values(page)["units"]["heads"]
    levels, depth, count = packed["shape"]
    unpacked = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), np.uint8))
    masks = unpacked[: levels * depth * count].reshape(levels, depth, count)
    expected = model.routing(torch.tensor(report.blocks.t)).heads.numpy() > 0.5
    assert (masks == expected).all()
    # The mean over the units is the share that the map shows.
    assert np.allclose(masks.mean(axis=2), report.blocks.heads, atol=1e-6)


def test_tokens_and_samples(page: Path, profiled: tuple[Any, ProfileReport, Source]) -> None:
    model, _, source = profiled
    said = values(page)
    tokens = said["tokens"]
    assert tokens["shape"] == [2, 4, 3, 4, 4]
    maps = token_maps(model, source, objective_of(model), levels=4, images=2)
    assert base64.b64decode(tokens["masks"]) == np.packbits(maps.masks.numpy().reshape(-1)).tobytes()
    assert [len(levels) for levels in tokens["noised"]] == [4, 4]
    assert tokens["noise"] == sorted(tokens["noise"], reverse=True)
    assert [len(row["images"]) for row in said["samples"]["rows"]] == [2, 2]
    assert "latents" in said["samples"]["note"]


def test_it_is_complete_in_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    addresses = set(re.findall(r"""https?://[^\s"'<>\\)]+""", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG's vocabulary, which nothing asks for
    assert not re.search(r"<link|<script[^>]+src=|@import|url\(", text)
    assert "default-src 'none'" in text
    assert len(text) < 400_000


def test_a_text_cannot_end_the_script(page: Path) -> None:
    assert "</script><b>D" not in page.read_text(encoding="utf-8")
    assert values(page)["settings"]["data"] == "</script><b>D"


def test_a_static_preset_has_no_map_of_routers(tmp_path: Path) -> None:
    model = tiny_model("dit").set_execution("static")
    report = profile(model, ProfileSettings(latency=False, timesteps=3))
    content = gather(report, model, folder=None)
    assert (content.units, content.cost, content.lineage) == (None, [], [])
    assert "complete static model" in content.verdict
    assert render(content)


def test_videos_are_strips_of_frames(profiled: tuple[Any, ProfileReport, Source]) -> None:
    model, report, _ = profiled
    clips = np.zeros((2, 3, 8, 8, 3), np.uint8)
    samples = Samples((SampleRow("a", clips), SampleRow("b", clips)), ("", ""), "n")
    said = gather(report, model, folder=None, samples=samples).samples
    assert said is not None
    assert said["video"]
    image = base64.b64decode(said["rows"][0]["images"][0].partition(",")[2])
    assert int.from_bytes(image[16:20], "big") == 24


def test_pictures_and_bits() -> None:
    assert base64.b64decode(bits(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 1]))) == bytes([128, 128])
    assert png(np.zeros((4, 4, 3), np.uint8)).startswith("data:image/png;base64,")
    large = base64.b64decode(png(np.zeros((10, 800, 3), np.uint8)).partition(",")[2])
    assert int.from_bytes(large[16:20], "big") == 384


def test_the_static_row_is_the_base_if_it_is_given(profiled: tuple[Any, ProfileReport, Source]) -> None:
    model, _, _ = profiled
    other = tiny_model("dit", seed=5).set_execution("static")
    options = {"num_images": 1, "steps": 2, "classes": (0,)}
    alone, _ = draw_samples(model, **options)
    based, _ = draw_samples(model, base=other, **options)
    assert alone.rows[0].title != based.rows[0].title
    assert (alone.rows[0].images != based.rows[0].images).any()
    assert model.execution == "compact"


EXERCISE = """
<script>
(() => {
  const errors = [];
  addEventListener("error", (event) => errors.push(event.message));
  const page = document.getElementById("page"), said = {};
  const fire = (node, type, at) => node.dispatchEvent(new PointerEvent(type, { bubbles: true, clientX: at.x, clientY: at.y }));
  said.ready = document.documentElement.dataset.ready;
  said.sections = [...page.querySelectorAll("section")].map((node) => node.id);
  const map = document.querySelector("#map svg.map"), box = map.getBoundingClientRect();
  said.cells = map.querySelectorAll(".cell").length;
  said.readout = document.querySelector(".readout").textContent;
  fire(map, "pointermove", { x: box.left + box.width / 2, y: box.top + box.height / 2 });
  said.tip = document.getElementById("tip").textContent;
  document.querySelectorAll("#map button")[2].click();
  said.tokensReadout = document.querySelector(".readout").textContent;
  map.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  said.moved = document.querySelector(".readout").textContent;
  const slider = document.querySelector("#tokens input");
  const caption = () => document.querySelector("#tokens .tokens > div > figcaption").textContent;
  said.before = [caption(), document.querySelector("#tokens img").src.length];
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  said.after = [caption(), slider.getAttribute("aria-valuetext")];
  const chooser = document.querySelector("#tokens select"); chooser.value = "1"; chooser.dispatchEvent(new Event("change"));
  said.block = caption();
  said.images = [...document.images].every((image) => image.src.startsWith("data:"));
  said.wide = document.documentElement.scrollWidth <= innerWidth;
  said.errors = errors;
  const out = document.createElement("pre"); out.id = "said"; out.textContent = JSON.stringify(said); document.body.append(out);
})();
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_it_lives_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Map, tooltip, tabs, keys, slider and block chooser, at a laptop's width, without an error."""
    path = tmp_path / "exercised.html"
    path.write_text(
        page.read_text(encoding="utf-8").replace("</body>", EXERCISE + "</body>"), encoding="utf-8"
    )
    command = [
        *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"),
        *(f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    said = json.loads(html.unescape(found[1]))
    assert said["errors"] == []
    assert said["ready"] == "yes"
    assert said["sections"] == ["cost", "models", "map", "tokens", "samples", "origin"]
    assert said["cells"] == 5 * 3
    assert "of 6 heads" in said["readout"]
    assert "block 1" in said["tip"]
    assert "of 16 tokens" in said["tokensReadout"]
    assert said["moved"] != said["tokensReadout"]
    assert "noise" in said["after"][1]
    assert "% of the tokens kept" in said["block"]
    assert said["images"]
    assert said["wide"]


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    save_model(tiny_model("sit"), folder)
    quick = ["--timesteps", "3", "--no-latency", "--device", "cpu"]
    arguments = ["profile", "--model", str(folder), "--report", "r.html", *quick]
    assert main(arguments) == 0
    assert "Report: r.html" in capsys.readouterr().out
    said = values(Path("r.html"))
    assert said["samples"]["rows"][0]["title"] == "everything on, the same weights"
    assert said["tokens"] is None  # noise shows no tokens of real images
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments[: -len(quick)][:3], "--report", ".", *quick]) == 2
    assert "is a folder" in capsys.readouterr().err
