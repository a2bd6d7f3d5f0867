"""Measure and draw what trained routers decide: python scripts/learned.py --cells runs/reproduce --data FOLDER

    FOLDER: the four original IDX files of Fashion-MNIST, or fashion-mnist-subset.

    python scripts/learned.py --cells runs/reproduce --data F              the protocol's dynamic models; writes docs/learned.md
    python scripts/learned.py MODEL [MODEL ...] --data F --out runs/learned   any trained DiT or SiT with routers

The pictures show the first model of each family; the tables have all of them. With --cells, those are the dynamic cells of
scripts/reproduce.py that have run, at λ = 0.5 first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dydit_cli.artifacts import atomic_write
from dydit_cli.data.opening import PACKAGED
from scripts.reproduction.learned.decisions import IMAGES, LEVELS, decisions_of
from scripts.reproduction.learned.facts import facts_of
from scripts.reproduction.learned.page import page
from scripts.reproduction.learned.pictures import draw

FAMILIES = ("dit", "sit")
GROUPS = ("core", "extended")
SHOWN_RATIO = 0.5


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, help="folders of trained models")
    parser.add_argument("--cells", type=Path, help="folder of scripts/reproduce.py")
    parser.add_argument("--data", default="fashion-mnist-subset", help="whose held-out images are used")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of learned.md and images/")
    parser.add_argument("--images", type=int, default=IMAGES, help="held-out images at each noise level")
    parser.add_argument("--levels", type=int, default=LEVELS, help="noise levels")
    options = parser.parse_args(arguments)
    if bool(options.models) == bool(options.cells):
        parser.error("give either folders of models, or --cells")
    return options


def models_of(cells: Path) -> list[Path]:
    """The trained models of the dynamic cells that have run: DiT before SiT, λ = 0.5 first, by seed.

    Raises:
        SystemExit: If there is none, or one has been run under several keys.
    """
    found: dict[tuple[int, float, float, int], Path] = {}
    for file in sorted(cells.glob("cells/*/cell.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        if cell["arm"] != "dynamic" or cell["variant"] or cell["group"] not in GROUPS:
            continue
        place = (
            FAMILIES.index(cell["family"]),
            abs(cell["lambda"] - SHOWN_RATIO),
            cell["lambda"],
            cell["seed"],
        )
        if place in found:
            raise SystemExit(
                f"error: {cell['name']} has been run more than once ({found[place].parent.name}, {file.parent.name}); give the "
                "folders of the models instead of --cells"
            )
        found[place] = file.parent / "trained"
    if not found:
        raise SystemExit(f"error: no dynamic cell has run in {cells}")
    return [found[place] for place in sorted(found)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw, write."""
    options = options_of(arguments)
    data = options.data if options.data in PACKAGED else str(Path(options.data).expanduser().resolve())
    measured = []
    for folder in options.models or models_of(options.cells):
        found = decisions_of(folder, data, images=options.images, levels=options.levels)
        measured.append((found, facts_of(found)))
        print(f"measured {found.name}", flush=True)
    firsts = {found.family: found for found, _ in reversed(measured)}
    shown = [firsts[family] for family in FAMILIES if family in firsts]
    names = draw(shown, options.out / "images")
    asked = "--cells runs/reproduce" if options.cells else "MODEL ..."
    given = data if data in PACKAGED else "FOLDER"
    text = page(shown, measured, f"python scripts/learned.py {asked} --data {given}")
    with atomic_write(options.out / "learned.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    for name in ("learned.md", *(f"images/{name}" for name in names)):
        print(f"written: {options.out / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
